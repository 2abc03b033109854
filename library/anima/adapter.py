"""Anima's LLM adapter: reads Qwen3 states into the rows of a T5 token sequence.

B batch · T T5 tokens · S Qwen3 tokens · D adapter width · H heads · K head width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.anima.layout import AdapterConfig
from library.nn.attention import NormedAttention
from library.nn.blocks import BlockRunner, run_plainly
from library.nn.norms import RmsNorm
from library.nn.rope import RopeTable, rope_angles, rope_table


class LlmAdapter(nn.Module):
    """(Qwen3 states, T5 ids) -> context rows for the DiT's cross-attention."""

    def __init__(self, config: AdapterConfig, context_dim: int):
        super().__init__()
        self.config = config
        self.run_block: BlockRunner = run_plainly
        # Its usual random start imports torch's compiler when on the meta device: a second, and 70 MiB.
        self.embed = nn.Embedding.from_pretrained(torch.zeros(config.vocabulary, config.width), freeze=False)
        self.blocks = nn.ModuleList(LLMAdapterTransformerBlock(config) for _ in range(config.blocks))
        self.out_proj = nn.Linear(config.width, context_dim)
        self.norm = RmsNorm(context_dim)

    def forward(self, states: Tensor, t5_ids: Tensor, state_mask: Tensor | None = None, t5_mask: Tensor | None = None) -> Tensor:
        """states (B, S, source width), t5_ids (B, T), masks (B, S) and (B, T), 1 = valid, None = all -> (B, T, context width).

        Rows of masked T5 tokens hold numbers without a meaning.
        """
        x = self.embed(t5_ids)  # (B, T, D)
        tables = self.rope_tables(t5_ids.shape[1], states.shape[1], x.device)
        states = states.to(x.dtype)
        for number, block in enumerate(self.blocks):
            x = self.run_block(number, block, x, states, (t5_mask, state_mask), tables)
        return self.norm(self.out_proj(x))

    def rope_tables(self, t5_tokens: int, states: int, device: torch.device) -> tuple[RopeTable, RopeTable]:
        """Both sequences count their own positions from 0."""
        angles = rope_angles(max(t5_tokens, states), self.config.head_dim, self.config.rope_theta, device)
        return rope_table(angles[:t5_tokens]), rope_table(angles[:states])


class LLMAdapterTransformerBlock(nn.Module):
    """Self-attention over T5 rows, cross-attention to Qwen3 states, MLP; each with a norm before it."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.norm_self_attn = RmsNorm(config.width)
        self.self_attn = AdapterAttention(config, key_width=config.width)
        self.norm_cross_attn = RmsNorm(config.width)
        self.cross_attn = AdapterAttention(config, key_width=config.source_width)
        self.norm_mlp = RmsNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_hidden), nn.GELU(), nn.Linear(config.mlp_hidden, config.width)
        )

    def forward(
        self, x: Tensor, states: Tensor, masks: tuple[Tensor | None, Tensor | None], tables: tuple[RopeTable, RopeTable]
    ) -> Tensor:
        """x (B, T, D), states (B, S, source width); masks and tables: first of the T5 rows, then of the states."""
        (t5_mask, state_mask), (t5_table, state_table) = masks, tables
        normed = self.norm_self_attn(x)
        x = x + self.self_attn(normed, normed, t5_mask, (t5_table, t5_table))
        x = x + self.cross_attn(self.norm_cross_attn(x), states, state_mask, (t5_table, state_table))
        return x + self.mlp(self.norm_mlp(x))


class AdapterAttention(NormedAttention):
    """Both sequences have rotary positions of their own; keys may be masked."""

    def __init__(self, config: AdapterConfig, *, key_width: int):
        super().__init__(config.width, key_width=key_width, heads=config.heads, head_dim=config.head_dim)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, source: Tensor, key_mask: Tensor | None, tables: tuple[RopeTable, RopeTable]) -> Tensor:
        return self.o_proj(self.mix(x, source, tables, key_mask=key_mask))
