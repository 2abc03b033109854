"""Tiny MMDiTs of all kinds with real key names, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.files.safetensors_file import save_safetensors
from library.nn.loading import load_into
from library.sd3.checkpoint import build_denoiser
from library.sd3.denoiser import Mmdit
from library.sd3.layout import LARGE_35, MEDIUM, MEDIUM_35, MmditConfig, expected_shapes

TINY = MmditConfig(
    width=64,
    blocks=3,
    heads=2,
    mlp_hidden=96,
    position_side=12,
    pooled_width=20,
    context_width=24,
    qk_norm=True,
    dual_blocks=(0, 1),
)
KINDS = {
    MEDIUM: replace(TINY, qk_norm=False, dual_blocks=(), heads=1),  # without norms nothing in the file tells the heads
    MEDIUM_35: TINY,
    LARGE_35: replace(TINY, dual_blocks=()),
}


def tiny_weights(config: MmditConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Random, and scaled so that no layer is dead."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if ".ln_" in name:
            weights[name] = 1 + 0.1 * values
        elif name == "pos_embed":
            weights[name] = values
        else:
            weights[name] = values / torch.tensor(shape[1:]).prod() ** 0.5 if len(shape) > 1 else 0.1 * values
    return weights


def tiny_denoiser(config: MmditConfig = TINY, dtype: torch.dtype = torch.float32) -> Mmdit:
    denoiser = build_denoiser(config)
    load_into(denoiser, tiny_weights(config).items(), device="cpu", dtype=dtype)
    return denoiser


def save_tiny(path: Path, config: MmditConfig = TINY, *, prefix: str = "", **header: str) -> Path:
    """``header``: metadata entries."""
    save_safetensors(path, {prefix + name: tensor for name, tensor in tiny_weights(config).items()}, metadata=header)
    return path


def batch(config: MmditConfig = TINY, height: int = 8, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents, timesteps, context, pooled of two samples"""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, height, width, generator=generator)
    context = torch.randn(2, 9, config.context_width, generator=generator)
    pooled = torch.randn(2, config.pooled_width, generator=generator)
    return latents, torch.tensor([250.0, 801.5]), context, pooled
