"""One micro-batch, as the training step receives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from library.dataset.conditioning import Conditioning

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """B images of one bucket. Latent grid (h, w) = pixel size / 8.

    With several processes, ``positions`` are the places of these images in the global batch of ``global_size`` images, so
    that N processes draw the noise, and weigh the loss, that one process with the whole batch would.
    """

    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1]; None when latents come from the cache
    latents: Tensor | None  # (B, C, h, w) scaled latents (what the denoiser sees); None when they are encoded each step
    text: Conditioning | None  # cached encoder output; None when the encoder runs every step
    captions: tuple[str, ...]  # as the encoder gets them, after shuffling and dropout
    loss_weights: Tensor  # (B,) float32, 1.0 = counts fully
    positions: tuple[int, ...]
    global_size: int
    item_keys: tuple[str, ...]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        def move(value):
            return None if value is None else value.to(device, non_blocking=non_blocking)

        return replace(self, pixels=move(self.pixels), latents=move(self.latents), text=move(self.text),
                       loss_weights=move(self.loss_weights))  # fmt: skip

    def pin_memory(self) -> Batch:
        def pin(value):
            return None if value is None else value.pin_memory()

        return replace(self, pixels=pin(self.pixels), latents=pin(self.latents), text=pin(self.text),
                       loss_weights=pin(self.loss_weights))  # fmt: skip


def normalized_pixels(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """B pictures (H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], contiguous."""
    batch = np.empty((len(pictures), 3, *pictures[0].shape[:2]), np.float32)  # (B, 3, H, W)
    for row, picture in zip(batch, pictures, strict=True):
        np.divide(picture.transpose(2, 0, 1), np.float32(127.5), out=row)
    batch -= 1.0
    return batch
