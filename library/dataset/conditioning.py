"""What every architecture's text output has in common, so that caches and batches can handle it unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Self = TypeVar("Self", bound="Conditioning")


class Conditioning(Protocol):
    """Text conditioning of B captions: a frozen dataclass of tensors, one class per architecture."""

    def to(self: Self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Moves every tensor; dtypes stay as they are."""

    def pin_memory(self: Self) -> Self:
        """Page-locked copies, for transfers that do not block."""

    def split(self: Self) -> list[Self]:
        """B conditionings of one caption each."""

    def cache_tensors(self) -> dict[str, Tensor]:
        """For ONE caption (B = 1): what a cache stores, only the valid rows, without the batch axis. Each has an axis."""

    @classmethod
    def from_cache(cls: type[Self], tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> Self:
        """The inverse of ``cache_tensors`` for B captions: what was stored as (L, ...) for each of them comes as one tensor
        (B, longest L, ...) with zeros past the ``lengths`` of the B."""

    @classmethod
    def stack(cls: type[Self], parts: Sequence[Self]) -> Self:
        """Joins conditionings along the batch axis, padding to the longest."""
