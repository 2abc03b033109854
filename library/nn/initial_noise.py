"""The noise that a picture starts from, for all models with latents of an eighth of the picture's side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRIDE = 8  # pixels per latent side


def initial_noise(seed: int, size_wh: tuple[int, ...], channels: int = 16) -> Tensor:
    """(1, channels, height / 8, width / 8) in fp32 on the CPU, the same on every machine; ``size_wh`` in pixels."""
    width, height = size_wh
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, height // STRIDE, width // STRIDE, generator=generator)


def initial_noises(seeds: Sequence[int], size_wh: tuple[int, ...], channels: int = 16) -> Tensor:
    """(B, channels, height / 8, width / 8): the noise of each seed, whatever the others are."""
    return torch.cat([initial_noise(seed, size_wh, channels) for seed in seeds])
