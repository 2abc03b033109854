"""The gate of SwiGLU, arXiv 2002.05202, which keeps less for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, of one shape and dtype"""
    if torch.compiler.is_compiling():  # a compiler chooses itself what it keeps
        return F.silu(gate) * x
    return _SiluProduct.apply(gate, x)


class _SiluProduct(torch.autograd.Function):
    """Keeps its two inputs, where recording the steps would keep silu(gate), too: as much as a fifth of what a block needs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return F.silu(gate).mul_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, x = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grads[0] * x, gate) if ctx.needs_input_grad[0] else None
        return grad_gate, F.silu(gate).mul_(grads[0]) if ctx.needs_input_grad[1] else None
