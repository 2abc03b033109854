"""Factors of each sample on rows of samples that lie beside or behind each other.

B batch · D width · spans: of one row of tokens (1, sum of spans, D), how many each sample has; None: x is (B, rows, D)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.nn import modulation

Spans = tuple[int, ...] | None


def scaled(x: Tensor, factors: Tensor, spans: Spans = None) -> Tensor:
    """x * factors of its sample, (B, 1, D)"""
    return modulation.scaled(x, factors) if spans is None else _ScaledSpans.apply(None, x, factors, spans)


def gated(x: Tensor, factors: Tensor, branch: Tensor, spans: Spans) -> Tensor:
    """x + factors of its sample, (B, 1, D), * branch"""
    return modulation.gated(x, factors, branch) if spans is None else _ScaledSpans.apply(x, branch, factors, spans)


class _ScaledSpans(torch.autograd.Function):
    """(x or nothing) + y * factors, sample by sample into one result: the factors are never as large as the tokens, as they would
    have to be for one product, and would then be kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor | None, y: Tensor, factors: Tensor, spans: tuple[int, ...]) -> Tensor:
        out = torch.empty_like(y)
        parts = (tensor.split(spans, dim=1) for tensor in ((out, y) if x is None else (out, y, x)))
        for factor, into, part, *base in zip(factors.split(1), *parts, strict=True):
            if base:
                torch.addcmul(base[0], part, factor, out=into)
            else:
                torch.mul(part, factor, out=into)
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, factors)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,), spans = grads, ctx.spans
        y, factors = ctx.saved_tensors
        grad_y, grad_factors = torch.empty_like(grad), []
        parts = zip(factors.split(1), grad.split(spans, dim=1), grad_y.split(spans, dim=1), strict=True)
        others = [None] * len(spans) if y is None else y.split(spans, dim=1)
        for (factor, part, into), other in zip(parts, others, strict=True):
            if other is not None:  # in the memory of the gradient of y, before that is written
                grad_factors.append(torch.mul(part, other, out=into).sum(1, keepdim=True))
            torch.mul(part, factor, out=into)
        grad_base = grad if ctx.needs_input_grad[0] else None
        return grad_base, grad_y, torch.cat(grad_factors) if grad_factors else None, None
