"""A Qwen-Image VAE of a few channels with random weights, in the key layout of the published single file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from library.anima.vae_layout import expected_shapes
from library.files.safetensors_file import save_safetensors

SIZES = (16, (16, 16, 32, 32), 1, 16)  # stem, widths, blocks, latent channels: wide enough for the CPU's own convolution
WAN_PARTS = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv": "resample.1"}
WAN_TOP = {"quant_conv": "conv1", "post_quant_conv": "conv2", "conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def tiny_vae_weights(*, seed: int = 0, sizes: tuple = SIZES) -> dict[str, Tensor]:
    """Published names and shapes: 3-D kernels with noise in the slices that one frame never sees, norms (C, 1, 1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(*sizes).items():
        key = wan_name(name)
        full = published_shape(key, shape)
        scale = 1 if name.endswith(("gamma", "bias")) else (shape[1] * shape[2] * shape[3]) ** -0.5
        weights[key] = torch.randn(full, generator=generator) * scale * (0.1 if name.endswith("bias") else 1)
        if name.endswith("gamma"):
            weights[key] = 1 + 0.2 * weights[key]
    width = sizes[1][1]
    weights["encoder.downsamples.3.time_conv.weight"] = torch.randn(width, width, 3, 1, 1, generator=generator)
    weights["encoder.downsamples.3.time_conv.bias"] = torch.randn(width, generator=generator)
    return weights


def wan_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    *place, part = module.split(".")
    if not place or len(place) == 1 and part in WAN_TOP:
        return ".".join([*place, WAN_TOP[part], leaf])
    group = "downsamples" if place[0] == "encoder" else "upsamples"
    return ".".join([re.sub("blocks", group, ".".join(place)), WAN_PARTS.get(part, part), leaf])


def published_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if key.endswith("gamma"):
        return (*shape, 1, 1) if ".norm." in key else (*shape, 1, 1, 1)
    if len(shape) == 4 and not any(part in key for part in ("resample", "to_qkv", "proj")):
        return (*shape[:2], 3 if shape[-1] == 3 else 1, *shape[2:])
    return shape


def save_tiny_vae(path: Path, **changes) -> Path:
    """``changes``: key with ``__`` for dots -> tensor, or None to leave the key out."""
    weights = tiny_vae_weights()
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_safetensors(path, weights)
    return path
