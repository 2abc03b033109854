"""From the order of an epoch to micro-batches, made ahead of time in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.dataset.batch import Batch, normalized_pixels
from library.dataset.captions import caption_for, is_dropped, variant_for
from library.dataset.conditioning import Conditioning
from library.dataset.images import load_pixels
from library.dataset.items import Item, TrainingSet
from library.dataset.latent_cache import LatentCache
from library.dataset.order import Entry, epoch_batches, is_flipped, rank_positions
from library.dataset.prefetch import Prefetch, prefetch
from library.dataset.text_cache import EMPTY, TextCache

if TYPE_CHECKING:
    from torch import Tensor

BATCHES_PER_WORKER = 2  # made ahead of the one in use
KEPT_EPOCHS = 2  # at an epoch's end the threads work on the next one already

Place = tuple[int, int]  # (epoch, 1-based; number of the global batch in it, 0-based)


@dataclass(frozen=True, kw_only=True)
class _Showing:
    """One image as one batch shows it."""

    item: Item
    seed: int
    epoch: int
    occurrence: int

    @property
    def when(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "occurrence": self.occurrence}


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
    pin_memory: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: dict[int, Sequence[tuple[Entry, ...]]] = {}

    def batches(self, start_epoch: int, start_index: int, *, workers: int) -> Prefetch[Place, tuple[int, int, Batch | None]]:
        """Endless (epoch, number, micro-batch) from there on, epoch after epoch, made ahead by ``workers`` threads.

        With 0 workers each is made on demand. Close it when done. Its ``waited_s`` is the time that training has waited for data.
        """
        return prefetch(
            self._numbered, self._places(start_epoch, start_index), workers=workers, depth=workers * BATCHES_PER_WORKER
        )

    def micro_batch(self, epoch: int, index: int) -> Batch | None:
        """This process' share of global batch ``index`` of ``epoch`` (1-based); None when the batch has too few images for it."""
        import torch

        entries = self._order(epoch)[index]
        positions = tuple(rank_positions(len(entries), rank=self.rank, processes=self.processes))
        if not positions:
            return None
        showings = [self._showing(epoch, entries[position]) for position in positions]
        captions, text = self._text(showings)
        weights = [self.prior_loss_weight if showing.item.subset.is_reg else 1.0 for showing in showings]
        batch = Batch(
            pixels=self._pixels(showings) if self.latent_cache is None else None,
            latents=None if self.latent_cache is None else self._latents(self.latent_cache, showings),
            text=text,
            captions=captions,
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            positions=positions,
            global_size=len(entries),
            item_keys=tuple(showing.item.key for showing in showings),
        )
        return batch.pin_memory() if self.pin_memory else batch

    def _numbered(self, place: Place) -> tuple[int, int, Batch | None]:
        return (*place, self.micro_batch(*place))

    def _places(self, epoch: int, index: int) -> Iterator[Place]:
        while True:
            for number in range(index, len(self._order(epoch))):
                yield epoch, number
            epoch, index = epoch + 1, 0

    def _order(self, epoch: int) -> Sequence[tuple[Entry, ...]]:
        with self._lock:
            if epoch not in self._orders:
                self._orders[epoch] = epoch_batches(self.training_set, seed=self.seed, epoch=epoch, processes=self.processes)
                for old in sorted(self._orders)[:-KEPT_EPOCHS]:
                    if old != epoch:
                        del self._orders[old]
            return self._orders[epoch]

    def _showing(self, epoch: int, entry: Entry) -> _Showing:
        position, occurrence = entry
        return _Showing(item=self.training_set.items[position], seed=self.seed, epoch=epoch, occurrence=occurrence)

    def _pixels(self, showings: Sequence[_Showing]) -> Tensor:
        import torch

        pictures = [load_pixels(showing.item, flipped=is_flipped(showing.item, **showing.when)) for showing in showings]
        return torch.from_numpy(normalized_pixels(pictures))  # (B, 3, H, W)

    def _latents(self, cache: LatentCache, showings: Sequence[_Showing]) -> Tensor:
        import torch

        parts = [cache.load(showing.item, flipped=is_flipped(showing.item, **showing.when)) for showing in showings]
        return torch.stack(parts)  # (B, C, h, w)

    def _text(self, showings: Sequence[_Showing]) -> tuple[tuple[str, ...], Conditioning | None]:
        """The captions as the encoder gets them or got them, and what it made of them if that is cached."""
        if self.text_cache is None:
            return tuple(caption_for(showing.item, **showing.when) for showing in showings), None
        captions, parts = zip(*(self._cached_text(self.text_cache, showing) for showing in showings), strict=True)
        return captions, type(parts[0]).stack(parts)

    def _cached_text(self, cache: TextCache, showing: _Showing) -> tuple[str, Conditioning]:
        if is_dropped(showing.item, **showing.when):
            return EMPTY, cache.load_text(EMPTY)
        variant = variant_for(showing.item, **showing.when, variants=cache.variants)
        return cache.text_of(showing.item, variant), cache.load(showing.item, variant)
