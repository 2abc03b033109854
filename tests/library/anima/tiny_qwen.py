"""A Qwen3 text encoder of a few channels with random weights; 151,936 embeddings, because captions come with real ids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from library.anima.text_layout import TextEncoderConfig, expected_shapes
from library.files.safetensors_file import save_safetensors

TINY_QWEN = TextEncoderConfig(width=12, blocks=2, heads=4, key_heads=2, head_dim=8, mlp_hidden=20)
SMALL_VOCABULARY = TextEncoderConfig(width=12, blocks=2, heads=4, key_heads=2, head_dim=8, mlp_hidden=20, vocabulary=64)


def tiny_qwen_weights(config: TextEncoderConfig = TINY_QWEN, *, prefix: str = "model.") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
            for name, shape in expected_shapes(config).items()}  # fmt: skip


def save_tiny_qwen(path: Path, config: TextEncoderConfig = TINY_QWEN, *, prefix: str = "model.", **changes) -> Path:
    """``changes``: key with ``__`` for dots -> tensor, or None to leave the key out."""
    weights = tiny_qwen_weights(config, prefix=prefix)
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_safetensors(path, weights)
    return path
