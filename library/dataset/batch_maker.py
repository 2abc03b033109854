"""From showings to a Batch: pixels or latents, masks, captions or their conditioning, sizes and weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from library.dataset.augment import told_crop
from library.dataset.batch import Batch, normalized_pixels
from library.dataset.buckets import Placement
from library.dataset.caches.latent_cache import LatentCache
from library.dataset.caches.text_cache import EMPTY, TextCache
from library.dataset.conditioning import Conditioning
from library.dataset.images import Picture, load_picture
from library.dataset.items import DatasetSettings, Item
from library.dataset.showing import Showing
from library.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TURN_S = 0.002  # about what a batch takes from files that the system keeps in memory

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchMaker:
    """Makes batches out of showings of one bucket of one dataset. Safe in threads."""

    datasets: Sequence[DatasetSettings]
    latent_cache: LatentCache | None  # None: batches carry pixels
    text_cache: TextCache | None  # None: batches carry captions only
    pin_memory: bool = False
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def batch(self, showings: Sequence[Showing], *, positions: tuple[int, ...], global_size: int) -> Batch:
        """``positions``: where the showings lie in the global batch of ``global_size`` images.

        Raises DatasetError naming the file for an image or cache file that cannot be read any more.
        """
        with nullcontext() if self.latent_cache is None else self._own_turn():
            return self._batch(showings, positions=positions, global_size=global_size)

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Reading files that are in memory is many short calls. Threads that do it at once hand Python's lock to and fro between
        them and are slower together than one; so they take turns, until one takes long because it waits for a disk."""
        taken = self._turn.acquire(timeout=TURN_S)
        try:
            yield
        finally:
            if taken:
                self._turn.release()

    def _batch(self, showings: Sequence[Showing], *, positions: tuple[int, ...], global_size: int) -> Batch:
        import torch

        first = showings[0].item
        pixels, latents, mask = _done(showings, self._pictures)
        captions, text = _done(showings, self._texts)
        batch = Batch(
            pixels=pixels,
            latents=latents,
            mask=mask,
            text=text,
            captions=captions,
            loss_weights=torch.tensor([showing.loss_weight for showing in showings], dtype=torch.float32),
            original_wh=torch.tensor([showing.item.size_wh for showing in showings]),  # (B, 2)
            crop_left_top=torch.tensor([self._told_crop(showing) for showing in showings]),  # (B, 2)
            target_wh=first.bucket_wh,
            network_multiplier=self.datasets[first.dataset_index].network_multiplier,
            custom_attributes=tuple(showing.item.custom_attributes for showing in showings),
            positions=positions,
            global_size=global_size,
            item_keys=tuple(showing.item.key for showing in showings),
            latent_seeds=() if pixels is None else tuple(showing.item.latent_seed for showing in showings),
        )
        return batch.pin_memory() if self.pin_memory else batch

    def _pictures(self, showings: Sequence[Showing]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Pixels (B, 3, H, W) or latents (B, C, h, w), and masks (B, 1, h, w) where an image has one."""
        import torch

        if self.latent_cache is not None:
            return None, *self.latent_cache.load_batch([(showing.item, showing.is_flipped) for showing in showings])
        pictures = [_live_picture(showing) for showing in showings]
        pixels = torch.from_numpy(normalized_pixels([picture.pixels for picture in pictures]))  # (B, 3, H, W)
        return pixels, None, stacked_masks([picture.mask for picture in pictures])

    def _told_crop(self, showing: Showing) -> tuple[int, int]:
        """Of the crop that was made: cached latents are never cropped at random."""
        placement = showing.placement if self.latent_cache is None else Placement.of(showing.item)
        return told_crop(placement, flipped=showing.is_flipped)

    def _texts(self, showings: Sequence[Showing]) -> tuple[tuple[str, ...], Conditioning | None]:
        """The captions as the encoder gets them or got them, and what it made of them if that is cached."""
        cache = self.text_cache
        if cache is None:
            return tuple(showing.caption for showing in showings), None
        texts = [_cached_text(showing, cache) for showing in showings]
        return tuple(text for _, text in texts), cache.load_batch(texts)


def _cached_text(showing: Showing, cache: TextCache) -> tuple[Item | None, str]:
    """The text that is shown, and the item that it is cached with."""
    if showing.is_caption_dropped:
        return None, EMPTY
    return showing.item, cache.text_of(showing.item, showing.variant(cache.variants))


def stacked_masks(masks: Sequence[np.ndarray | None]) -> Tensor | None:
    """B masks (h, w) -> (B, 1, h, w) float32, with ones where an image has none; None where none has one."""
    import numpy as np
    import torch

    first = next((mask for mask in masks if mask is not None), None)
    if first is None:
        return None
    return torch.from_numpy(np.stack([np.ones_like(first) if mask is None else mask for mask in masks])[:, None])


def _live_picture(showing: Showing) -> Picture:
    return load_picture(showing.item, placement=showing.placement, colours=showing.colours, flipped=showing.is_flipped)


def _done(showings: Sequence[Showing], make: Callable[[Sequence[Showing]], Part]) -> Part:
    """``make`` of all. What goes wrong names the image, also where it is no mistake of the user's."""
    try:
        return make(showings)
    except UserError:
        raise  # names its file
    except Exception as error:
        if len(showings) > 1:
            for showing in showings:
                _done([showing], make)
        paths = ", ".join(str(showing.item.path) for showing in showings)
        raise RuntimeError(f"{paths} could not be made ready for training: {error}") from error
