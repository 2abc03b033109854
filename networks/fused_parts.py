"""LoRAs of fused Linears, whose rows are several projections one after the other, such as q, k and v.

Each projection ("part") may have a pair of its own. In a file they are one pair, which every program reads as it is: the down
halves above each other, the up halves as blocks along the diagonal. Its rank is the sum of theirs, and so is its alpha: then
alpha / rank, what programs multiply with, is what it was in training.

M_i rows of part i, M their sum · r rank of each part · P parts · K inputs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Sizes = tuple[int, ...]  # rows of each part


def block_diagonal(ups: Sequence[Tensor]) -> Tensor:
    """[(M_i, r_i), ...] -> (sum of M_i, sum of r_i), zero outside of the blocks."""
    return torch.block_diag(*ups)


def blocks_of(up: Tensor, sizes: Sizes) -> list[Tensor] | None:
    """(M, P r) -> the parts' own (M_i, r) on the diagonal; None where something else is not zero, or the shape is another."""
    if not sizes or up.ndim != 2 or up.shape[0] != sum(sizes) or up.shape[1] % len(sizes):
        return None
    rank = up.shape[1] // len(sizes)
    blocks = [rows[:, part * rank : (part + 1) * rank] for part, rows in enumerate(up.split(list(sizes)))]
    inside = sum(int(block.count_nonzero()) for block in blocks)
    return blocks if inside == int(up.count_nonzero()) else None


def is_split(up: Tensor, sizes: Sizes) -> bool:
    """Whether it is the up halves of several parts, and of more than nothing."""
    return blocks_of(up, sizes) is not None and bool(up.count_nonzero())


def trained_form(down: Tensor, up: Tensor, sizes: Sizes, *, rank: int) -> tuple[Tensor, Tensor] | None:
    """A file's pair -> what is trained of it, down (P r, K) and up (M, r), where each part has ``rank``.

    Of one pair for all rows, of that rank, each part gets the down half: the same LoRA, with P times the alpha. None for pairs
    that cannot be cut so.
    """
    if down.shape[0] == rank and tuple(up.shape) == (sum(sizes), rank):
        return down.repeat(len(sizes), 1), up
    blocks = blocks_of(up, sizes) if down.shape[0] == rank * len(sizes) else None
    return None if blocks is None else (down, torch.cat(blocks))
