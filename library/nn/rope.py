"""Rotary position embedding in the half-split form: channel j turns together with channel j + K/2. arXiv 2104.09864.

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


def rope_angles(positions: int, width: int, theta: float, device: torch.device) -> Tensor:
    """(positions, width / 2): position n turns pair i by n * theta^(-2i / width)."""
    frequencies = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequencies)
