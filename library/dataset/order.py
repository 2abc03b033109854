"""Which images form which batch: a pure function of (seed, epoch), the same for any number of workers and after any resume.

An *entry* is one showing of one image. Its occurrence counts the image's showings over the whole run, so that caption
shuffling, dropout and flips differ from one showing to the next.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import overload

from library.dataset.items import Item, TrainingSet
from library.randomness import python_random, uniform

Entry = tuple[int, int]  # (position in TrainingSet.items, occurrence: 0, 1, 2 ... over the run)
Bucket = tuple[int, tuple[int, int]]  # (dataset, (width, height)): the images that can share a batch


@dataclass(frozen=True, slots=True)
class EpochOrder(Sequence[tuple[Entry, ...]]):
    """The global batches of one epoch, in training order: each a tuple of entries of one bucket of one dataset.

    The entries lie in arrays of numbers, batch after batch, so that an epoch of 100,000 images takes 1 MB.
    """

    positions: array[int]  # of each entry
    occurrences: array[int]  # of each entry
    starts: array[int]  # of each batch in these, in training order
    ends: array[int]

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> tuple[Entry, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[Entry, ...]]: ...

    def __getitem__(self, index: int | slice) -> tuple[Entry, ...] | list[tuple[Entry, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        entries = slice(self.starts[index], self.ends[index])
        return tuple(zip(self.positions[entries], self.occurrences[entries], strict=True))


class OrderSource:
    """Makes the orders of the epochs of one run. What does not change between epochs is worked out once."""

    def __init__(self, training_set: TrainingSet, *, seed: int, processes: int):
        self._seed = seed
        self._repeats = array("I", (item.repeats for item in training_set.items))
        self._buckets = [
            (bucket, array("I", (item.index for item in items)), _batch_size(training_set, bucket, processes))
            for bucket, items in items_by_bucket(training_set.items).items()
        ]

    def epoch(self, number: int) -> EpochOrder:
        """The order of an epoch, which is 1-based.

        A global batch holds batch_size * processes entries of one bucket; a bucket's last batch holds what is left, so every
        entry appears exactly once.
        """
        positions, occurrences, batches = array("I"), array("I"), []
        for (dataset_index, bucket_wh), items, size in self._buckets:
            entries = self._entries(items, number)
            python_random("order in bucket", self._seed, number, dataset_index, *bucket_wh).shuffle(entries)
            first, end = len(positions), len(positions) + len(entries)
            positions.extend(position for position, _ in entries)
            occurrences.extend(occurrence for _, occurrence in entries)
            batches += [(start, min(start + size, end)) for start in range(first, end, size)]
        python_random("order of batches", self._seed, number).shuffle(batches)
        starts, ends = (array("I", bounds) for bounds in (zip(*batches, strict=True) if batches else ((), ())))
        return EpochOrder(positions, occurrences, starts, ends)

    def _entries(self, items: Iterable[int], epoch: int) -> list[Entry]:
        entries: list[Entry] = []
        for position in items:
            repeats = self._repeats[position]
            first = (epoch - 1) * repeats
            entries += zip(repeat(position, repeats), range(first, first + repeats), strict=True)
        return entries


def batches_per_epoch(training_set: TrainingSet, *, processes: int) -> int:
    """How many an epoch of ``OrderSource`` has, which is the same for every seed and epoch."""
    entries: dict[Bucket, int] = defaultdict(int)
    for item in training_set.items:
        entries[item.dataset_index, item.bucket_wh] += item.repeats
    return sum(-(-count // _batch_size(training_set, bucket, processes)) for bucket, count in entries.items())


def validation_batches(training_set: TrainingSet, *, seed: int) -> list[tuple[int, ...]]:
    """Batches of validation images: positions in TrainingSet.validation, each image once, of one bucket each.

    The order depends on the seed alone. Images and batches are shuffled, so that the first batches are a fair sample of all.
    """
    batches: list[tuple[int, ...]] = []
    first = len(training_set.items)  # where the index of validation items begins
    for bucket, items in items_by_bucket(training_set.validation).items():
        dataset_index, bucket_wh = bucket
        positions = [item.index - first for item in items]
        python_random("validation order in bucket", seed, dataset_index, *bucket_wh).shuffle(positions)
        size = _batch_size(training_set, bucket, 1)
        batches += [tuple(positions[start : start + size]) for start in range(0, len(positions), size)]
    python_random("validation order of batches", seed).shuffle(batches)
    return batches


def rank_positions(size: int, *, rank: int, processes: int) -> range:
    """The places of a global batch of ``size`` entries that process ``rank`` trains: contiguous, as even as can be.

    Empty where there are more processes than entries.
    """
    share, extra = divmod(size, processes)
    start = rank * share + min(rank, extra)
    return range(start, start + share + (rank < extra))


def is_flipped(item: Item, *, seed: int, epoch: int, occurrence: int) -> bool:
    """Whether this showing is mirrored: half of them where flip_aug is on."""
    return item.subset.flip_aug and uniform("flip", seed, item.key, epoch, occurrence) < 0.5


def items_by_bucket(items: Iterable[Item]) -> dict[Bucket, list[Item]]:
    """The items of each bucket in their fixed order; buckets in the order of (dataset, width, height)."""
    buckets: dict[Bucket, list[Item]] = defaultdict(list)
    for item in items:
        buckets[item.dataset_index, item.bucket_wh].append(item)
    return dict(sorted(buckets.items()))


def _batch_size(training_set: TrainingSet, bucket: Bucket, processes: int) -> int:
    return training_set.datasets[bucket[0]].batch_size * processes
