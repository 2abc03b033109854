"""Tiny CLIP text encoders as tensors under the names that files give them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from library.files.weights_source import file_tensors
from library.sd.clip_layout import GELU, ClipConfig, Layout, clip_part, clip_pieces, expected_shapes
from library.sd.layout import Part

TINY_L = ClipConfig(width=16, layers=3, heads=2, mlp_width=24)
TINY_G = ClipConfig(width=24, layers=4, heads=3, mlp_width=32, activation=GELU, projection=20)


@dataclass(frozen=True)
class MemorySource:
    """A WeightsSource without a file."""

    held: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path("model.safetensors")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.held.items()}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(names)
        return ((name, tensor) for name, tensor in self.held.items() if name in wanted)


def clip_tensors(config: ClipConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the module's names, large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in expected_shapes(config).items()}
    for name in tensors:
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


def clip_source(config: ClipConfig, layout: Layout, *, prefix: str = "", seed: int = 0) -> MemorySource:
    """The encoder in a file's names, with the metadata that tells its heads."""
    tensors = file_tensors(clip_tensors(config, seed), clip_pieces(config, layout))
    number = 1 if "embedders.1." in prefix else 0
    entry = {"heads": config.heads, "activation": config.activation}
    metadata = {"config": json.dumps({"text": [{}] * number + [entry]})}
    return MemorySource({prefix + name: tensor for name, tensor in tensors.items()}, metadata)


def tiny_part(config: ClipConfig, layout: Layout = "hf", *, seed: int = 0) -> Part[ClipConfig]:
    return clip_part(clip_source(config, layout, seed=seed), prefix="", layout=layout, keep_layers=None)
