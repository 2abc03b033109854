"""From the order of an epoch to micro-batches, made ahead of time in threads; and the fixed batches of validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from library.dataset.batch import Batch
from library.dataset.batch_maker import BatchMaker
from library.dataset.caches.latent_cache import LatentCache
from library.dataset.caches.text_cache import TextCache
from library.dataset.captions import Moment
from library.dataset.clock import Clock
from library.dataset.items import Item, TrainingSet
from library.dataset.order import Entry, EpochOrder, OrderSource, rank_positions, validation_batches
from library.dataset.prefetch import Prefetch, prefetch
from library.dataset.showing import FixedShowing, TrainingShowing, When

BATCHES_PER_WORKER = 2  # made ahead of the one in use


@dataclass(frozen=True, slots=True)
class _Place:
    """One global batch: what it holds and where in the run it is."""

    epoch: int  # 1-based
    number: int  # in its epoch, from 0
    entries: tuple[Entry, ...]
    moment: Moment | None


@dataclass(eq=False)
class BatchSource:
    """Makes the micro-batches of process ``rank`` of ``processes``.

    What a batch holds is a pure function of (seed, epoch, number): it does not depend on the threads that make it or on where a
    run was interrupted. Safe in threads.
    """

    training_set: TrainingSet
    seed: int = field(kw_only=True)
    rank: int = field(default=0, kw_only=True)
    processes: int = field(default=1, kw_only=True)
    latent_cache: LatentCache | None = field(default=None, kw_only=True)  # None: batches carry pixels
    text_cache: TextCache | None = field(default=None, kw_only=True)  # None: batches carry captions only
    prior_loss_weight: float = field(default=1.0, kw_only=True)
    clock: Clock | None = field(default=None, kw_only=True)  # None: token warm-up is over
    pin_memory: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.training_set.items:
            raise ValueError("there is nothing to train")  # the scan has refused such a set
        self._orders = OrderSource(self.training_set, seed=self.seed, processes=self.processes)
        self._maker = BatchMaker(
            datasets=self.training_set.datasets,
            latent_cache=self.latent_cache,
            text_cache=self.text_cache,
            pin_memory=self.pin_memory,
        )

    def batches(self, start_epoch: int, start_index: int, *, workers: int) -> Prefetch[_Place, tuple[int, int, Batch | None]]:
        """Endless (epoch, number, micro-batch) from there on, epoch after epoch, made ahead by ``workers`` threads.

        With 0 workers each is made on demand. Close it when done. Its ``waited_s`` is the time that training has waited for data.
        """
        return prefetch(
            self._numbered, self._places(start_epoch, start_index), workers=workers, depth=workers * BATCHES_PER_WORKER
        )

    def _numbered(self, place: _Place) -> tuple[int, int, Batch | None]:
        return place.epoch, place.number, self._batch(place)

    def _batch(self, place: _Place) -> Batch | None:
        """This process' share of a global batch; None where that has too few images for it."""
        size = len(place.entries)
        positions = tuple(rank_positions(size, rank=self.rank, processes=self.processes))
        if not positions:
            return None
        showings = [self._showing(place, place.entries[position]) for position in positions]
        return self._maker.batch(showings, positions=positions, global_size=size)

    def _showing(self, place: _Place, entry: Entry) -> TrainingShowing:
        position, occurrence = entry
        return TrainingShowing(
            item=self.training_set.items[position],
            when=When(seed=self.seed, epoch=place.epoch, occurrence=occurrence),
            moment=place.moment,
            prior_loss_weight=self.prior_loss_weight,
        )

    def _places(self, epoch: int, index: int) -> Iterator[_Place]:
        """The threads get what their batch holds along with its number: none of them needs an epoch's order."""
        while True:
            order = self._orders.epoch(epoch)
            for number in range(index, len(order)):
                yield self._place(epoch, number, order)
            epoch, index = epoch + 1, 0

    def _place(self, epoch: int, number: int, order: EpochOrder) -> _Place:
        moment = None if self.clock is None else self.clock.moment(epoch, number, batches_per_epoch=len(order))
        return _Place(epoch, number, order[number], moment)


class ValidationBatches:
    """The fixed batches of a training set's validation images: each image once, without flips, dropout or any other chance.

    A batch has up to batch_size images of one bucket of one dataset. The order is shuffled and depends on ``seed`` alone, so
    that ``limit`` batches are a fair sample; None: all of them. Safe in threads.
    """

    def __init__(  # noqa: PLR0913  # the trainer's one call
        self,
        training_set: TrainingSet,
        *,
        latent_cache: LatentCache | None,
        text_cache: TextCache | None,
        seed: int,
        limit: int | None = None,
        pin_memory: bool = False,
    ):
        self._items = training_set.validation
        self._batches = validation_batches(training_set, seed=seed)[:limit]
        self._maker = BatchMaker(
            datasets=training_set.datasets, latent_cache=latent_cache, text_cache=text_cache, pin_memory=pin_memory
        )

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def items(self) -> list[Item]:
        """The images of all batches."""
        return [self._items[position] for positions in self._batches for position in positions]

    def batch(self, number: int) -> Batch:
        """Batch ``number``, from 0."""
        showings = [FixedShowing(item=self._items[position]) for position in self._batches[number]]
        return self._maker.batch(showings, positions=tuple(range(len(showings))), global_size=len(showings))

    def batches(self, *, workers: int, rank: int = 0, processes: int = 1) -> Prefetch[int, Batch]:
        """Every ``processes``-th batch from ``rank`` on, made ahead by ``workers`` threads. Close it when stopping early."""
        numbers = range(rank, len(self), processes)
        return prefetch(self.batch, numbers, workers=workers, depth=workers * BATCHES_PER_WORKER)
