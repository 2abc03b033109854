"""Normalisations whose output keeps the dtype of their input, also under autocast; the sums inside are fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight. arXiv 1910.07467."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Autocast would turn x and the result into fp32: two more copies, and a residual stream that changes its dtype.
        with torch.autocast(x.device.type, enabled=False):
            return rms_norm(x, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) / sqrt(mean(x^2) + eps) * weight (K,)"""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CpuRmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _CpuRmsNorm(torch.autograd.Function):
    """Torch has no kernel of its own for this on the CPU; the backward of its composition takes seven times as long as this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad = at_least_fp32(x), at_least_fp32(grads[0])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * wide).mul_(inverse).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # y = r x, r = (mean(x^2) + eps)^(-1/2):  dL/dx = r g - x r^3 (g . x) / K, where g is already times the weight
        grad = grad * weight
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return torch.addcmul(grad.mul_(inverse), wide, along).to(x.dtype), grad_weight, None


def at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis without weights."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], eps=eps)
