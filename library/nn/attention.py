"""Attention over heads. B batch · N queries · S keys · H heads · K head width"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from library.nn.norms import RmsNorm
from library.nn.rope import RopeTable, apply_rope


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """q (B, N, H, K), k and v (B, S, H, K) -> (B, N, H * K).

    key_mask (B, S), true or 1 = takes part; None where nothing is masked, which lets torch take its fastest kernel.
    Where every key of a sample is masked, or S is 0, the result is zero, not NaN.
    """
    if k.shape[1] == 0:
        return q.new_zeros(q.shape).flatten(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, K)
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    mask = key_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
    empty = ~mask.any(dim=-1, keepdim=True)
    # An empty sample attends to everything and is erased afterwards: no 0/0 forward, no NaN gradient backward.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty)
    return out.masked_fill(empty, 0).transpose(1, 2).flatten(2)


class NormedAttention(nn.Module):
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

    def mix(
        self, x: Tensor, source: Tensor, tables: tuple[RopeTable, RopeTable] | None, key_mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, width), source (B, S, key width), tables of their rotary positions, key_mask (B, S) -> (B, N, H * K)."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1)))  # (B, N, H, K)
        k = self.k_norm(self.k_proj(source).unflatten(-1, (self.heads, -1)))  # (B, S, H, K)
        v = self.v_proj(source).unflatten(-1, (self.heads, -1))
        if tables is not None:
            q, k = apply_rope(q, tables[0]), apply_rope(k, tables[1])
        return attend(q, k, v, key_mask)
