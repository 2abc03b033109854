"""Changed copies of the tiny Gemma, for tests of what is read and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from library.files.open_weights import open_weights
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.files.weights_source import WeightsSource


def gemma_tensors(path: Path) -> dict[str, Tensor]:
    """Of a file, with its names."""
    return dict(read_tensors(read_header(path)))


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in tensors.items()}


def written(path: Path, tensors: Mapping[str, Tensor], *, like: Path) -> WeightsSource:
    """With the header of ``like``."""
    save_safetensors(path, tensors, read_header(like).metadata)
    return open_weights(path, flag="--gemma2")
