"""When in a run something is shown: from batches of an epoch to optimizer steps."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock

from library.dataset.captions import Moment
from library.dataset.items import TrainingSet
from library.dataset.order import OrderSource


@dataclass(frozen=True, slots=True)
class Clock:
    """How batches become steps: an optimizer step takes ``accumulation`` consecutive batches of one epoch (the last one of an
    epoch may take fewer), and the run has ``total_steps`` of them."""

    accumulation: int
    total_steps: int

    def moment(self, epoch: int, number: int, *, batches_per_epoch: int) -> Moment:
        """When global batch ``number`` (from 0) of ``epoch`` (from 1) is trained."""
        steps_per_epoch = -(-batches_per_epoch // self.accumulation)
        return Moment((epoch - 1) * steps_per_epoch + number // self.accumulation, self.total_steps)


class Moments:
    """When each showing of a training set comes; the order of an epoch is worked out when first asked for. Safe in threads."""

    def __init__(self, training_set: TrainingSet, clock: Clock, *, seed: int, processes: int):
        self._repeats = [item.repeats for item in training_set.items]
        self._starts = list(accumulate(self._repeats, initial=0))  # of each item's showings among those of an epoch
        self._orders = OrderSource(training_set, seed=seed, processes=processes)
        self._clock, self._lock = clock, Lock()
        self._known: dict[int, tuple[Sequence[int], int]] = {}

    def of(self, position: int, occurrence: int) -> Moment:
        """``position`` in TrainingSet.items; ``occurrence`` counts the item's showings over the whole run, from 0."""
        epoch, repeat = occurrence // self._repeats[position] + 1, occurrence % self._repeats[position]
        with self._lock:
            numbers, batches = self._known.get(epoch) or self._read(epoch)
        return self._clock.moment(epoch, numbers[self._starts[position] + repeat], batches_per_epoch=batches)

    def _read(self, epoch: int) -> tuple[Sequence[int], int]:
        """(the number of the global batch that holds each showing of the epoch, how many batches there are)"""
        order = self._orders.epoch(epoch)
        numbers = array("I", bytes(4 * self._starts[-1]))
        for number, batch in enumerate(order):
            for position, occurrence in batch:
                numbers[self._starts[position] + occurrence % self._repeats[position]] = number
        self._known[epoch] = numbers, len(order)
        return self._known[epoch]
