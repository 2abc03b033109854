"""Factors and shifts of each sample on its tokens, by which a DiT is told the noise level (adaptive norms, arXiv 2212.09748).

B batch · N tokens of a sample · D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split_modulation(values: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(B, parts * D) -> ``parts`` of (B, 1, D)."""
    return values.unsqueeze(1).chunk(parts, dim=-1)


def modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """shift + normed * (1 + scale); normed (B, N, D), shift and scale (B, 1, D)"""
    return _plus_product(shift, normed, 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch; x and branch (B, N, D), gate (B, 1, D)"""
    return _plus_product(x, branch, gate)


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """x * factors; x (B, N, D), factors (B, 1, D)"""
    return _PlusProduct.apply(None, x, factors) if _is_learned(factors) else x * factors


def _plus_product(base: Tensor, y: Tensor, factors: Tensor) -> Tensor:
    return _PlusProduct.apply(base, y, factors) if _is_learned(factors) else torch.addcmul(base, y, factors)


def _is_learned(factors: Tensor) -> bool:
    """What is below is only better for their gradient; and a compiler fuses better what it sees through."""
    return factors.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _PlusProduct(torch.autograd.Function):
    """(base or nothing) + y * factors, where a gradient of the factors is wanted, as it is with a LoRA on the modulation: for it
    alone recording the steps would make two more tensors as large as the tokens. This makes none: it takes the memory of the
    gradient of y, before that is written."""

    @staticmethod
    def forward(ctx: Any, base: Tensor | None, y: Tensor, factors: Tensor) -> Tensor:
        """base (B, N, D) or (B, 1, D), y (B, N, D), factors (B, 1, D)"""
        ctx.save_for_backward(y, factors if ctx.needs_input_grad[1] else None)
        ctx.sums_base = base is not None and base.shape[1] != y.shape[1]
        return y * factors if base is None else torch.addcmul(base, y, factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,), (y, factors) = grads, ctx.saved_tensors
        grad_base = None
        if ctx.needs_input_grad[0]:
            grad_base = grad.sum(1, keepdim=True) if ctx.sums_base else grad
        product = grad * y
        grad_factors = product.sum(1, keepdim=True)
        return grad_base, None if factors is None else torch.mul(grad, factors, out=product), grad_factors
