"""Tiny DiTs with real key names, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import AdapterConfig, DenoiserConfig, expected_shapes
from library.files.safetensors_file import save_safetensors
from library.nn.loading import load_into

TINY = DenoiserConfig(
    width=32,
    blocks=2,
    heads=2,
    head_dim=24,
    mlp_hidden=48,
    adaln_dim=8,
    context_dim=20,
    adapter=AdapterConfig(vocabulary=64, width=20, source_width=28, blocks=2, heads=2, head_dim=10, mlp_hidden=24),
)


def tiny_weights(config: DenoiserConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Random, and scaled so that no layer is dead."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * values if len(shape) == 1 and "norm" in name else values / shape[-1] ** 0.5
    return weights


def tiny_denoiser(config: DenoiserConfig = TINY, dtype: torch.dtype = torch.float32) -> AnimaDenoiser:
    with torch.device("meta"):
        denoiser = AnimaDenoiser(config)
    load_into(denoiser, tiny_weights(config).items(), device="cpu", dtype=dtype)
    return denoiser


def save_tiny(path: Path, *, prefix: str = "net.", config: DenoiserConfig = TINY, **changes: Tensor | None) -> Path:
    """``changes``: name -> another tensor, or None to leave it out; ``__`` in a keyword stands for a dot."""
    weights: dict[str, Tensor] = tiny_weights(config)
    for keyword, tensor in changes.items():
        name = keyword.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_safetensors(path, {prefix + name: tensor for name, tensor in weights.items()}, {"format": "pt"})
    return path


def batch(size: int = 2, height: int = 8, width: int = 6, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """latents, sigmas and context for ``TINY``."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(size, 16, height, width, generator=generator),
        torch.rand(size, generator=generator),
        torch.randn(size, rows, TINY.context_dim, generator=generator),
    )
