"""Rotary position embedding, arXiv 2104.09864, in its two forms.

Half-split: channel j turns together with channel j + K/2 (``rope_table``, ``apply_rope``). In pairs: channel 2j with channel
2j + 1 (``pair_table``, ``apply_rope_pairs``), which are the parts of a complex number.

N positions · H heads · K head width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class RopeTable(NamedTuple):
    """fp32, (N, 1, K) each: the middle axis stands for the heads. The sign of the rotation is inside ``sin``."""

    cos: Tensor
    sin: Tensor


def rope_table(angles: Tensor) -> RopeTable:
    """angles (N, K/2) in radians -> the table for ``apply_rope``."""
    cos, sin = angles.float().cos(), angles.float().sin()
    return RopeTable(torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1))


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """x (B, N, H, K) turned by the angle of its position; computed in fp32, returned in the dtype of x."""
    if torch.compiler.is_compiling():
        return rotate(x, table.cos, table.sin, 1)
    return _Rotation.apply(x, table.cos, table.sin)


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back: three kernels, where recording the steps would need eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, sin, -1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(x * cos, swapped, sin, value=direction).to(x.dtype)


def pair_table(angles: Tensor) -> Tensor:
    """angles (..., K/2) in radians, fp64 for many positions -> fp32 (..., K): cosine and sine of each pair beside each other."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(-2).float()


def apply_rope_pairs(x: Tensor, table: Tensor) -> Tensor:
    """x (B, N, H, K) turned in pairs, table (N, K) or, with positions of each sample's own, (B, N, K); computed in fp32, returned
    in the dtype of x."""
    if torch.compiler.is_compiling():
        return rotate_pairs(x, table)  # a compiler fuses it; it makes no code for complex numbers
    return _PairRotation.apply(x, table)


class _PairRotation(torch.autograd.Function):
    """As a product of complex numbers: one kernel, a fifth of the time of the half-split form on a CPU, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return times_complex(x, table, conjugate=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return times_complex(grads[0], table, conjugate=True), None


def times_complex(x: Tensor, table: Tensor, *, conjugate: bool) -> Tensor:
    """Shapes as of ``apply_rope_pairs``. ``conjugate``: turned back."""
    wide = x if x.dtype == table.dtype else x.to(table.dtype)
    numbers = torch.view_as_complex(wide.contiguous().unflatten(-1, (-1, 2)))  # (B, N, H, K/2)
    turns = torch.view_as_complex(table.unflatten(-1, (-1, 2))).unsqueeze(-2)  # (..., N, 1, K/2)
    turned = numbers * (turns.conj() if conjugate else turns)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """The same without complex numbers."""
    cos, sin = table.unsqueeze(-2).unflatten(-1, (-1, 2)).unbind(-1)  # (..., N, 1, K/2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def rope_angles(positions: int, width: int, theta: float, device: torch.device) -> Tensor:
    """(positions, width / 2): position n turns pair i by n * theta^(-2i / width)."""
    frequencies = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequencies)
