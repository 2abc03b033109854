"""What drawing a picture takes from Anima: the noise it starts from, and the text as the denoiser wants it.

The way from noise to image is that of every flow model: library/sampling/flow_samplers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import VAE_SCALE
from library.anima.text import AnimaConditioning


def initial_noise(seed: int, size_wh: tuple[int, ...], channels: int = 16) -> Tensor:
    """(1, channels, height / 8, width / 8) in fp32 on the CPU, the same on every machine; ``size_wh`` in pixels."""
    width, height = size_wh
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, height // VAE_SCALE, width // VAE_SCALE, generator=generator)


def initial_noises(seeds: Sequence[int], size_wh: tuple[int, ...], channels: int = 16) -> Tensor:
    """(B, channels, height / 8, width / 8): the noise of each seed."""
    return torch.cat([initial_noise(seed, size_wh, channels) for seed in seeds])


@dataclass(frozen=True, slots=True, eq=False)
class TextContext:
    """The text as the denoiser takes it."""

    context: Tensor  # (B, 512, C)
    used_rows: int  # from this row on the context is zero

    def repeated(self, images: int) -> TextContext:
        """The only text for each of ``images``."""
        return TextContext(self.context.expand(images, -1, -1), self.used_rows)


def encode_context(denoiser: AnimaDenoiser, text: AnimaConditioning) -> TextContext:
    """What the LLM adapter makes of the text conditioning of B captions."""
    return TextContext(denoiser.encode_context(*text.adapter_inputs), text.used_rows)


def velocity_of(denoiser: AnimaDenoiser) -> Callable[[Tensor, Tensor, TextContext], Tensor]:
    """The denoiser as samplers call it: (latents (B, 16, h, w), sigmas (B,), text) -> velocity."""
    return lambda latents, sigmas, text: denoiser(latents, sigmas, text.context, used_rows=text.used_rows)
