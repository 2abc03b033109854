"""Anima's prompt -> image loop: Euler steps along the flow, with guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VAE_SCALE = 8  # pixels per latent side

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (latents, sigmas (B,), context) -> velocity noise - image


def sample_latents(  # noqa: PLR0913  # what one picture needs
    predict: Predict,
    noise: Tensor,
    *,
    positive: Tensor,
    negative: Tensor | None,
    scale: float,
    steps: int,
    shift: float,
) -> Tensor:
    """noise (B, 16, h, w), contexts (B, T, C) -> scaled latents (B, 16, h, w) in the dtype of ``noise``.

    Guidance ``negative + scale * (positive - negative)`` (arXiv 2207.12598) only where ``scale`` > 1 and there is a negative.
    """
    sigmas = flow_sigmas(steps, shift)
    times = sigmas.to(noise.device)[:, None].expand(-1, noise.shape[0])  # (steps + 1, B)
    latents = noise
    for step in range(steps):
        velocity = predict(latents, times[step], positive)
        if negative is not None and scale > 1:
            velocity = torch.lerp(predict(latents, times[step], negative), velocity, scale)
        latents = latents + velocity * (sigmas[step + 1] - sigmas[step]).item()
    return latents


def flow_sigmas(steps: int, shift: float) -> Tensor:
    """(steps + 1,) in fp32 on the CPU: from 1 to 0 in even steps, then shifted towards noise."""
    sigmas = torch.linspace(1, 0, steps + 1)
    return shift * sigmas / (1 + (shift - 1) * sigmas)  # SD3, arXiv 2403.03206, section 5.3.2


def initial_noise(seed: int, size_wh: tuple[int, ...], channels: int = 16) -> Tensor:
    """(1, channels, height / 8, width / 8) in fp32 on the CPU, the same on every machine; ``size_wh`` in pixels."""
    width, height = size_wh
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, height // VAE_SCALE, width // VAE_SCALE, generator=generator)
