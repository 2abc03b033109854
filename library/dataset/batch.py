"""One micro-batch, as the training step receives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from library.dataset.conditioning import Conditioning

if TYPE_CHECKING:
    import torch
    from torch import Tensor


MOVED = ("pixels", "latents", "mask", "text", "loss_weights", "original_wh", "crop_left_top")  # to the device


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """B images of one bucket. Latent grid (h, w) = pixel size / 8.

    With several processes, ``positions`` are the places of these images in the global batch of ``global_size`` images, so
    that N processes draw the noise, and weigh the loss, that one process with the whole batch would.
    """

    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1]; None when latents come from the cache
    latents: Tensor | None  # (B, C, h, w) scaled latents (what the denoiser sees); None when they are encoded each step
    mask: Tensor | None  # (B, 1, h, w) float32 in [0, 1]: how much each place counts in the loss; None = all fully
    text: Conditioning | None  # cached encoder output; None when the encoder runs every step
    captions: tuple[str, ...]  # as the encoder gets them, after shuffling and dropout
    loss_weights: Tensor  # (B,) float32, 1.0 = counts fully
    original_wh: Tensor  # (B, 2) int64, pixels of the upright image file
    crop_left_top: Tensor  # (B, 2) int64, pixels cut off the resized image, counted in the mirrored one where it is mirrored
    target_wh: tuple[int, int]  # pixels of the bucket
    network_multiplier: float  # strength of the network for these images
    custom_attributes: tuple[Mapping[str, object], ...]  # of each image
    positions: tuple[int, ...]
    global_size: int
    item_keys: tuple[str, ...]
    latent_seeds: tuple[int, ...] = ()  # of the images, for what their encoding draws at random; none with cached latents

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        return self._with_tensors(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._with_tensors(lambda value: value.pin_memory())

    def _with_tensors(self, change: Callable[[Any], Any]) -> Batch:
        present = ((name, getattr(self, name)) for name in MOVED)
        return replace(self, **{name: change(value) for name, value in present if value is not None})


def normalized_pixels(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """B pictures (H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], contiguous."""
    batch = np.empty((len(pictures), 3, *pictures[0].shape[:2]), np.float32)  # (B, 3, H, W)
    for row, picture in zip(batch, pictures, strict=True):
        np.divide(picture.transpose(2, 0, 1), np.float32(127.5), out=row)
    batch -= 1.0
    return batch
