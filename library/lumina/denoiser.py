"""Lumina Image 2.0's denoiser, a Next-DiT (arXiv 2503.21758). Names of modules are those of the published checkpoint.

B batch · h, w latent rows and columns · N = h/2 * w/2 image tokens · n valid caption tokens of a sample · T the most of a batch
L = n + N · D width · C width of the caption's states · H heads · G heads of keys · K head width

A sample is its caption's tokens and then the image's; none sees another one's, nor a token of padding. Where the captions of a
batch are equally long, samples lie beside each other: (B, L, D). Where they are not, they lie behind each other, as one row of
tokens (1, sum of L, D), whose ``spans`` say how long each sample is: nothing is computed for padding, and attention, sample by
sample, needs no mask. With ``packs`` off they are padded to the longest and masked instead, which keeps the samples' axis and the
number of shapes small: for torch.compile, and for LoRAs that drop ranks of each sample.

The classes JointTransformerBlock, JointAttention, FeedForward and FinalLayer bear the names by which third-party network modules
(LyCORIS) find what to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.lumina.layout import NextDitConfig
from library.lumina.rotary import RotaryTables
from library.lumina.sample_rows import Spans, gated, scaled
from library.nn.attention import KernelAttention
from library.nn.blocks import BlockRunner, run_plainly
from library.nn.embeddings import time_sinusoid
from library.nn.norms import RmsNorm, layer_norm
from library.nn.patches import patch_rows, unpatchify
from library.nn.rope import apply_rope_pairs
from library.nn.swiglu import silu_product

PADDED_TO = 32  # caption rows, where they are padded: masks of odd lengths are slow on GPUs


class NextDit(nn.Module):
    """(noisy latents, time, caption) -> velocity ``image - noise``."""

    def __init__(self, config: NextDitConfig):
        super().__init__()
        self.config = config
        self.run_block: BlockRunner = run_plainly
        self.packs = True
        self.t_embedder = TimestepEmbedder(config)
        self.cap_embedder = nn.Sequential(
            RmsNorm(config.context_width, config.norm_eps), nn.Linear(config.context_width, config.width)
        )
        self.context_refiner = Refiner(config, config.context_refiners, modulated=False)
        self.x_embedder = nn.Linear(config.in_channels * config.patch**2, config.width)
        self.noise_refiner = Refiner(config, config.noise_refiners, modulated=True)
        self.layers = nn.ModuleList(JointTransformerBlock(config, modulated=True) for _ in range(config.blocks))
        self.final_layer = FinalLayer(config)
        self._rotary = RotaryTables(config)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    def forward(self, latents: Tensor, times: Tensor, states: Tensor, lengths: Sequence[int]) -> Tensor:
        """latents (B, 16, h, w) scaled, times (B,) in [0, 1] with 0 = pure noise and 1 = image, states (B, T, C) of the captions,
        lengths: how many rows of ``states`` are valid in each sample, from the first one on. h and w are even.

        Returns the velocity, shaped and typed as ``latents``. Never waits for the device.
        """
        grid = latents.shape[2] // self.config.patch, latents.shape[3] // self.config.patch
        form = self._form(tuple(map(int, lengths)), grid, latents.device)
        time = F.silu(self.t_embedder(times, self.dtype))  # (B, time width); every modulation begins with this SiLU
        captions = self.cap_embedder(form.captions(states.to(self.dtype)))  # (B, T, D) or (1, sum of n, D)
        captions = self.context_refiner(captions, None, form.caption_tokens)
        image = self.x_embedder(patch_rows(latents.to(self.dtype), self.config.patch))  # (B, N, D)
        image = self.noise_refiner(image, time, form.image_tokens)
        x = form.joined(captions, image)  # (B, L, D) or (1, sum of L, D)
        for number, block in enumerate(self.layers):
            x = self.run_block(number, block, x, time, *form.tokens)
        patches = self.final_layer(form.image_of(x), time)  # (B, N, patch * patch * 16)
        return unpatchify(patches, latents.shape, self.config.patch).to(latents.dtype)

    def _form(self, lengths: tuple[int, ...], grid: tuple[int, int], device: torch.device) -> Form:
        tables = [self._rotary.of(length, grid, device) for length in lengths]
        if len(set(lengths)) == 1:
            return equal_form(lengths[0], tables[0])
        return packed_form(lengths, tables) if self.packs else padded_form(lengths, tables)


class Tokens(NamedTuple):
    """What a block has to know of the rows that it is given, besides the rows."""

    rope: Tensor  # (rows, K), or (B, rows, K) where samples have positions of their own
    spans: Spans = None  # of one row of samples behind each other: how many tokens each sample has
    key_mask: Tensor | None = None  # (B, rows) bool, False at padding


@dataclass(frozen=True, slots=True)
class Form:
    """How the tokens of one batch lie."""

    lengths: tuple[int, ...]
    caption_tokens: Tokens
    image_tokens: Tokens
    tokens: Tokens  # of caption and image together

    def captions(self, states: Tensor) -> Tensor:
        """states (B, T, C), T at least the longest caption -> the rows to compute with."""
        if self.caption_tokens.spans is not None:
            return torch.cat([rows[:length] for rows, length in zip(states, self.lengths, strict=True)]).unsqueeze(0)
        rows = self.caption_tokens.rope.shape[-2]
        found = F.pad(states, (0, 0, 0, rows - states.shape[1])) if rows > states.shape[1] else states[:, :rows]
        if self.caption_tokens.key_mask is None:
            return found
        return found.masked_fill(~self.caption_tokens.key_mask.unsqueeze(-1), 0)  # masked keys of NaN would still be NaN

    def joined(self, captions: Tensor, image: Tensor) -> Tensor:
        """captions as the context refiner returns them, image (B, N, D) -> rows of both."""
        if self.tokens.spans is None:
            return torch.cat((captions, image), dim=1)
        pairs = zip(captions[0].split(self.lengths), image, strict=True)
        return torch.cat([part for pair in pairs for part in pair]).unsqueeze(0)

    def image_of(self, x: Tensor) -> Tensor:
        """The way back: (B, N, D)"""
        if self.tokens.spans is None:
            return x[:, self.caption_tokens.rope.shape[-2] :]
        samples = zip(x[0].split(self.tokens.spans), self.lengths, strict=True)
        return torch.stack([rows[length:] for rows, length in samples])


def equal_form(length: int, table: Tensor) -> Form:
    """Samples beside each other, captions of one length. table (L, K)"""
    return Form((), Tokens(table[:length]), Tokens(table[length:]), Tokens(table))


def packed_form(lengths: tuple[int, ...], tables: Sequence[Tensor]) -> Form:
    """Samples behind each other. tables: (L, K) of each sample"""
    captions = torch.cat([table[:length] for table, length in zip(tables, lengths, strict=True)])
    image = torch.stack([table[length:] for table, length in zip(tables, lengths, strict=True)])  # (B, N, K)
    spans = tuple(length + image.shape[1] for length in lengths)
    return Form(lengths, Tokens(captions, lengths), Tokens(image), Tokens(torch.cat(list(tables)), spans))


def padded_form(lengths: tuple[int, ...], tables: Sequence[Tensor]) -> Form:
    """Samples beside each other, captions padded on the right. tables: (L, K) of each sample"""
    rows = -(-max(lengths) // PADDED_TO) * PADDED_TO
    halves = [(table[:length], table[length:]) for table, length in zip(tables, lengths, strict=True)]
    captions = torch.stack([F.pad(table, (0, 0, 0, rows - len(table))) for table, _ in halves])  # (B, rows, K)
    image = torch.stack([table for _, table in halves])  # (B, N, K)
    mask = torch.stack([torch.arange(rows, device=image.device) < length for length in lengths])  # (B, rows)
    whole = F.pad(mask, (0, image.shape[1]), value=True)
    tokens = Tokens(torch.cat((captions, image), dim=1), None, whole)
    return Form(lengths, Tokens(captions, None, mask), Tokens(image), tokens)


class TimestepEmbedder(nn.Module):
    """Time in [0, 1], as it is -> (B, time width)"""

    def __init__(self, config: NextDitConfig):
        super().__init__()
        self.width = config.frequencies
        self.mlp = nn.Sequential(
            nn.Linear(config.frequencies, config.time_width), nn.SiLU(), nn.Linear(config.time_width, config.time_width)
        )

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_sinusoid(times, self.width).to(dtype))


class Refiner(nn.ModuleList):
    """Blocks that see the caption alone, or the image alone, before both meet."""

    def __init__(self, config: NextDitConfig, count: int, *, modulated: bool):
        super().__init__(JointTransformerBlock(config, modulated=modulated) for _ in range(count))
        self.run_block: BlockRunner = run_plainly

    def forward(self, x: Tensor, time: Tensor | None, tokens: Tokens) -> Tensor:
        for number, block in enumerate(self):
            x = self.run_block(number, block, x, time, *tokens)
        return x


class JointTransformerBlock(nn.Module):
    """Self-attention and MLP, each between two norms, scaled and gated by the time where the block is ``modulated``."""

    def __init__(self, config: NextDitConfig, *, modulated: bool):
        super().__init__()
        self.attention = JointAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RmsNorm(config.width, config.norm_eps)
        self.ffn_norm1 = RmsNorm(config.width, config.norm_eps)
        self.attention_norm2 = RmsNorm(config.width, config.norm_eps)
        self.ffn_norm2 = RmsNorm(config.width, config.norm_eps)
        self.adaLN_modulation = modulation(config, 4) if modulated else None

    def forward(
        self, x: Tensor, time: Tensor | None, rope: Tensor, spans: Spans = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """x (B, rows, D) or, with ``spans``, (1, rows, D); time (B, time width); rope, spans, key_mask as in ``Tokens``."""
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, spans, key_mask))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale, gate, mlp_scale, mlp_gate = self.adaLN_modulation(time).unsqueeze(1).chunk(4, dim=-1)  # (B, 1, D) each
        mixed = self.attention(scaled(self.attention_norm1(x), 1 + scale, spans), rope, spans, key_mask)
        x = gated(x, gate.tanh(), self.attention_norm2(mixed), spans)
        hidden = self.feed_forward(scaled(self.ffn_norm1(x), 1 + mlp_scale, spans))
        return gated(x, mlp_gate.tanh(), self.ffn_norm2(hidden), spans)


class JointAttention(nn.Module, KernelAttention):
    """Queries in H heads; G heads of keys and values, each for H / G neighbouring heads of queries."""

    def __init__(self, config: NextDitConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        inner = config.heads * config.head_dim
        self.qkv = nn.Linear(config.width, inner + 2 * config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.q_norm = RmsNorm(config.head_dim, config.qk_norm_eps)
        self.k_norm = RmsNorm(config.head_dim, config.qk_norm_eps)

    @property
    def head_dim(self) -> int:
        return self.q_norm.weight.shape[0]

    def forward(self, x: Tensor, rope: Tensor, spans: Spans = None, key_mask: Tensor | None = None) -> Tensor:
        """As of the block."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, rows, H + 2G, K)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = apply_rope_pairs(self.q_norm(q), rope), apply_rope_pairs(self.k_norm(k), rope)
        if spans is None:
            return self.out(self.kernel(q, k, v, key_mask))
        samples = zip(q.split(spans, 1), k.split(spans, 1), v.split(spans, 1), strict=True)
        return self.out(torch.cat([self.kernel(*sample) for sample in samples], dim=1))


class FeedForward(nn.Module):
    """SwiGLU, arXiv 2002.05202."""

    def __init__(self, config: NextDitConfig):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.mlp_hidden, bias=False)
        self.w2 = nn.Linear(config.mlp_hidden, config.width, bias=False)
        self.w3 = nn.Linear(config.width, config.mlp_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu_product(self.w1(x), self.w3(x)))


class FinalLayer(nn.Module):
    """Image tokens -> patches of velocity."""

    def __init__(self, config: NextDitConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.in_channels * config.patch**2)
        self.adaLN_modulation = modulation(config, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(scaled(layer_norm(x), 1 + self.adaLN_modulation(time).unsqueeze(1)))


def modulation(config: NextDitConfig, parts: int) -> nn.Sequential:
    """(B, time width) -> (B, parts * D). The checkpoint counts a SiLU as layer 0; ``NextDit.forward`` has done it for all."""
    return nn.Sequential(nn.Identity(), nn.Linear(config.time_width, parts * config.width))
