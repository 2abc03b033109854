"""Weights as the user has them: one file of several kinds, or a folder's shards, seen as names, shapes and a stream of tensors.

Looking needs no torch for safetensors files. Whoever has a list of the names that a module needs makes :class:`Piece`s of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Config = TypeVar("Config")

THIRDS = ("q", "k", "v")  # of a tensor that holds three projections below each other


class WeightsSource(Protocol):
    """What a safetensors file, a pickle or several shards have in common."""

    @property
    def path(self) -> Path:
        """As the user named it: a file, or the folder of the shards."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, by its name in the file."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a safetensors header says besides; empty for others."""

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, CPU tensor in the file's dtype) of each of ``names``, in the order of the file, one at a time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor of a module lies in a file. ``change``: what makes the file's tensor the module's.

    "" = nothing; "transposed"; "matrix": (M, K, 1, 1) or (M, K) -> (M, K); "convolution": the reverse;
    "q", "k", "v": that third of the rows.
    """

    key: str
    change: str = ""


Pieces = Mapping[str, Piece]  # name in the module's state dict -> where it is in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Generic[Config]):
    """One model of a checkpoint, checked: every tensor that it needs is in the file, in its shape."""

    source: WeightsSource
    config: Config
    pieces: Pieces  # of the tensors that are loaded


def changed(tensor: Tensor, change: str) -> Tensor:
    """The module's tensor, made of the file's."""
    if change == "transposed":
        return tensor.t().contiguous()  # products round differently with other strides
    if change == "matrix":
        return tensor.flatten(1)
    if change == "convolution":
        return tensor.flatten(1)[:, :, None, None]
    if change in THIRDS:
        return tensor.chunk(3)[THIRDS.index(change)]
    return tensor


def changed_shape(shape: tuple[int, ...], change: str) -> tuple[int, ...]:
    """The shape that ``changed`` gives, without a tensor."""
    if change == "transposed":
        return shape[::-1]
    if change == "matrix":
        return shape[:2]
    if change == "convolution":
        return (*shape[:2], 1, 1)
    return (shape[0] // len(THIRDS), *shape[1:]) if change in THIRDS else shape


def module_tensors(source: WeightsSource, pieces: Pieces) -> Iterator[tuple[str, Tensor]]:
    """(name in the module, tensor), one tensor of the file at a time."""
    uses: dict[str, list[tuple[str, str]]] = {}
    for name, piece in pieces.items():
        uses.setdefault(piece.key, []).append((name, piece.change))
    for key, tensor in source.tensors(uses):
        for name, change in uses[key]:
            yield name, changed(tensor, change)


def file_tensors(tensors: Mapping[str, Tensor], pieces: Pieces, *, matrices_as: str = "matrix") -> dict[str, Tensor]:
    """The way back: a module's tensors under the names and in the shapes of a file. ``matrices_as``: what the file keeps a Piece
    with a change of "matrix" as, "matrix" or "convolution"."""
    import torch

    found: dict[str, dict[str, Tensor]] = {}
    for name, piece in pieces.items():
        if name in tensors:
            found.setdefault(piece.key, {})[piece.change] = tensors[name]
    result = {}
    for key, parts in found.items():
        if set(parts) & set(THIRDS):
            result[key] = torch.cat([parts[third] for third in THIRDS])
            continue
        ((change, tensor),) = parts.items()
        back = {"transposed": "transposed", "convolution": "matrix", "matrix": matrices_as}.get(change, "")
        result[key] = changed(tensor, back).contiguous()
    return result
