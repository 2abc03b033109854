"""Attention over heads. B batch · N queries · S keys · H heads · K head width"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from library.nn.attention_kernels import AttentionKernel, check_kernel
from library.nn.norms import RmsNorm
from library.nn.rope import RopeTable, apply_rope


class KernelAttention:
    """What every attention has, whichever model it is in: a mixin for modules. ``set_attention`` finds them by it."""

    kernel = AttentionKernel()  # one for all: other objects would be other code to a compiler

    @property
    def head_dim(self) -> int:
        raise NotImplementedError


class NormedAttention(nn.Module, KernelAttention):
    """Attention with RMS norms on queries and keys. A subclass adds the output projection, which checkpoints name differently."""

    def __init__(self, width: int, *, key_width: int, heads: int, head_dim: int):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.q_norm = RmsNorm(head_dim)
        self.k_proj = nn.Linear(key_width, inner, bias=False)
        self.k_norm = RmsNorm(head_dim)
        self.v_proj = nn.Linear(key_width, inner, bias=False)

    @property
    def head_dim(self) -> int:
        return self.q_norm.weight.shape[0]

    def mix(
        self,
        x: Tensor,
        source: Tensor,
        tables: tuple[RopeTable, RopeTable] | None,
        *,
        key_mask: Tensor | None = None,
        log_zeros: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, width), source (B, S, key width), tables of their rotary positions, key_mask (B, S) -> (B, N, H * K).

        log_zeros (): the source continues with that many rows of zeros, which ``cut_zero_rows`` has left out; no mask then.
        """
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1)))  # (B, N, H, K)
        k = self.k_norm(self.k_proj(source).unflatten(-1, (self.heads, -1)))  # (B, S, H, K)
        v = self.v_proj(source).unflatten(-1, (self.heads, -1))
        if tables is not None:
            q, k = apply_rope(q, tables[0]), apply_rope(k, tables[1])
        return self.kernel(q, k, v, key_mask, log_zeros=log_zeros)


def set_attention(model: nn.Module, kernel: AttentionKernel) -> None:
    """Gives every attention in ``model`` this kernel. What is compiled afterwards is compiled with it."""
    for module in attentions(model):
        module.kernel = kernel


def use_attention(model: nn.Module, kernel: AttentionKernel, *, device: torch.device, dtype: torch.dtype, trains: bool) -> None:
    """``set_attention`` of a kernel that has been tried with this model's heads. Raises OptionError where it cannot work.

    ``dtype``: what attention computes in (autocast's, where that is on); ``trains``: gradients are wanted.
    """
    widest = max((module.head_dim for module in attentions(model)), default=0)
    if widest:
        check_kernel(kernel, device, dtype, trains=trains, head_dim=widest)
        set_attention(model, kernel)


def attentions(model: nn.Module) -> Iterator[KernelAttention]:
    return (module for module in model.modules() if isinstance(module, KernelAttention))
