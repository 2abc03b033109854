"""What drawing a picture takes from Anima: the noise it starts from, and the text as the denoiser wants it.

The way from noise to image is that of every flow model: library/sampling/flow_samplers.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.anima.denoiser import AnimaDenoiser
from library.anima.text import AnimaConditioning

VAE_SCALE = 8  # pixels per latent side


def initial_noise(seed: int, size_wh: tuple[int, ...], channels: int = 16) -> Tensor:
    """(1, channels, height / 8, width / 8) in fp32 on the CPU, the same on every machine; ``size_wh`` in pixels."""
    width, height = size_wh
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, height // VAE_SCALE, width // VAE_SCALE, generator=generator)


def initial_noises(seeds: Sequence[int], size_wh: tuple[int, ...], channels: int = 16) -> Tensor:
    """(B, channels, height / 8, width / 8): the noise of each seed."""
    return torch.cat([initial_noise(seed, size_wh, channels) for seed in seeds])


def encode_context(denoiser: AnimaDenoiser, text: AnimaConditioning) -> Tensor:
    """What the LLM adapter makes of the text conditioning of B captions: (B, 512, C)."""
    return denoiser.encode_context(text.prompt_embeds, text.qwen_mask, text.t5_ids, text.t5_mask)
