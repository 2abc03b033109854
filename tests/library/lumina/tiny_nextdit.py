"""Tiny Next-DiTs with real key names, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.files.safetensors_file import save_safetensors
from library.lumina.denoiser import NextDit
from library.lumina.layout import NextDitConfig, expected_shapes
from library.nn.loading import load_into

TINY = NextDitConfig(
    width=48,
    blocks=2,
    context_refiners=1,
    noise_refiners=1,
    heads=4,
    kv_heads=2,
    head_dim=12,
    mlp_hidden=64,
    context_width=20,
    time_width=16,
    axes_dims=(4, 4, 4),
)


def tiny_weights(config: NextDitConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Random, and scaled so that no layer is dead."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        is_norm = "norm" in name or name == "cap_embedder.0.weight"
        weights[name] = 1 + 0.1 * values if is_norm else values / shape[-1] ** 0.5
    return weights


def tiny_denoiser(config: NextDitConfig = TINY, dtype: torch.dtype = torch.float32) -> NextDit:
    with torch.device("meta"):
        denoiser = NextDit(config)
    load_into(denoiser, tiny_weights(config).items(), device="cpu", dtype=dtype)
    return denoiser


def save_tiny(
    path: Path, *, prefix: str = "", config: NextDitConfig = TINY, header: str | None = None, **changes: object
) -> Path:
    """``changes``: name -> another tensor, or None to leave it out; ``__`` in a keyword stands for a dot."""
    weights: dict[str, Tensor] = {**tiny_weights(config), "norm_final.weight": torch.ones(config.width)}
    for keyword, tensor in changes.items():
        name = keyword.replace("__", ".")
        if isinstance(tensor, Tensor):
            weights[name] = tensor
        else:
            del weights[name]
    metadata = {"format": "pt"} if header is None else {"config": header}
    save_safetensors(path, {prefix + name: tensor for name, tensor in weights.items()}, metadata)
    return path


def batch(lengths: Sequence[int], height: int = 8, width: int = 6) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """latents, times, states (zero behind each caption) and lengths for ``TINY``."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(lengths), 16, height, width, generator=generator)
    times = torch.rand(len(lengths), generator=generator)
    states = torch.randn(len(lengths), max(lengths), TINY.context_width, generator=generator)
    for rows, length in zip(states, lengths, strict=True):
        rows[length:] = 0
    return latents, times, states, tuple(lengths)
