"""Anima's denoiser: the Cosmos-Predict2 DiT (arXiv 2501.03575) for single images, with an LLM adapter before it.

Names of modules are those of the published checkpoint, without its prefix.

B batch · h, w latent rows and columns · N = h/2 * w/2 image tokens · T context rows
D width · C context width · H heads · K head width

The classes Block, PatchEmbed, TimestepEmbedding and FinalLayer, and the adapter's LLMAdapterTransformerBlock, bear the names by
which third-party network modules (LyCORIS) find what to train.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima.adapter import LlmAdapter
from library.anima.layout import CONTEXT_ROWS, DenoiserConfig
from library.nn.attention import NormedAttention
from library.nn.blocks import BlockRunner, run_plainly
from library.nn.embeddings import time_sinusoid
from library.nn.modulation import gated, modulated, split_modulation
from library.nn.norms import RmsNorm, layer_norm
from library.nn.patches import unpatchify
from library.nn.rope import RopeTable, rope_angles, rope_table
from library.nn.zero_rows import can_cut, cut_zero_rows

ROPE_THETA = 10000.0
ROPE_TABLES_KEPT = 16  # one per bucket in use; a table of 4096 tokens takes 4 MiB


class AnimaDenoiser(nn.Module):
    """(noisy latents, noise level, context) -> velocity ``noise - image``."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.run_block: BlockRunner = run_plainly
        self.cuts_zero_rows = True  # right wherever the layers on the context make zeros of zeros
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = nn.Sequential(TimeSinusoid(config.width), TimestepEmbedding(config.width))
        self.t_embedding_norm = RmsNorm(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.final_layer = FinalLayer(config)
        self.llm_adapter = LlmAdapter(config.adapter, config.context_dim) if config.adapter is not None else None
        self._rope_tables: OrderedDict[tuple[int, int, torch.device], RopeTable] = OrderedDict()

    @property
    def dtype(self) -> torch.dtype:
        return self.t_embedding_norm.weight.dtype

    def forward(
        self,
        latents: Tensor,
        sigmas: Tensor,
        context: Tensor,
        padding_mask: Tensor | None = None,
        *,
        used_rows: int | None = None,
    ) -> Tensor:
        """latents (B, 16, h, w) scaled, sigmas (B,) in [0, 1] with 1 = pure noise, context (B, 512, C) from ``encode_context``.

        padding_mask (B, 1, any height, any width), 1 = not part of the picture; None = all of it is. h and w are even.
        used_rows: the caller knows that the context is zero from there on, as it is behind the longest caption; faster, and equal
        to rounding, with ``cuts_zero_rows``. None = every row is computed with.
        Returns the velocity, shaped and typed as ``latents``.
        """
        x = self.x_embedder(latents.to(self.dtype), padding_mask)  # (B, N, D)
        time, shared = self.embed_time(sigmas)  # (B, D), (B, 3D)
        rope = self.rope(latents.shape[2] // self.config.patch, latents.shape[3] // self.config.patch, x.device)
        context, log_zeros = self.cut_context(context.to(self.dtype), used_rows)
        for number, block in enumerate(self.blocks):
            x = self.run_block(number, block, x, context, time, shared, rope, log_zeros)
        patches = self.final_layer(x, time, shared)  # (B, N, patch * patch * 16)
        return unpatchify(patches, latents.shape, self.config.patch).to(latents.dtype)

    def cut_context(self, context: Tensor, used_rows: int | None) -> tuple[Tensor, Tensor | None]:
        """context (B, T, C) -> the rows to compute with, and the logarithm of how many zero rows follow them (None = no more)."""
        kind = context.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else context.dtype
        if used_rows is None or not self.cuts_zero_rows or not can_cut(context.device, dtype, self.config.head_dim):
            return context, None
        return cut_zero_rows(context, used_rows)

    def embed_time(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """sigmas (B,) -> what enters every modulation layer (B, D), and what is added to what leaves it (B, 3D)."""
        sinusoid = self.t_embedder[0](sigmas).to(self.dtype)
        # Every modulation begins with this SiLU of the same values, so it is done once.
        return F.silu(self.t_embedding_norm(sinusoid)), self.t_embedder[1](sinusoid)

    def encode_context(
        self, prompt_embeds: Tensor, qwen_mask: Tensor | None, t5_ids: Tensor, t5_mask: Tensor | None, *, rows: int = CONTEXT_ROWS
    ) -> Tensor:
        """prompt_embeds (B, S, Qwen3 width), t5_ids (B, T), masks (B, S) and (B, T), 1 = valid, None = all -> (B, rows, C).

        S and T may be cut to the longest caption of the batch, S even to 0. Masked rows and those after T are zero.
        """
        assert self.llm_adapter is not None, "this denoiser was built without an adapter"
        context = self.llm_adapter(prompt_embeds.to(self.dtype), t5_ids, qwen_mask, t5_mask)
        if t5_mask is not None:
            context = context.masked_fill(~t5_mask.bool().unsqueeze(-1), 0)
        assert context.shape[1] <= rows, f"{context.shape[1]} T5 tokens do not fit {rows} context rows"
        return F.pad(context, (0, 0, 0, rows - context.shape[1]))

    def rope(self, rows: int, columns: int, device: torch.device) -> RopeTable:
        """The rotary table of a grid, made once per grid and device; the least recently used one is dropped."""
        key = (rows, columns, device)
        if key not in self._rope_tables:
            with torch.inference_mode(False), torch.no_grad():  # kept tables must serve training too
                self._rope_tables[key] = rope_table(grid_angles(self.config, rows, columns, device))
        self._rope_tables.move_to_end(key)
        while len(self._rope_tables) > ROPE_TABLES_KEPT:
            self._rope_tables.popitem(last=False)
        return self._rope_tables[key]


class PatchEmbed(nn.Module):
    """Latents and a mask channel -> one token per patch; inside a patch the order is channel, row, column."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        features = (config.in_channels + 1) * config.patch**2
        self.proj = nn.Sequential(Patchify(config.patch), nn.Linear(features, config.width, bias=False))

    def forward(self, latents: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is None:
            x = F.pad(latents, (0, 0, 0, 0, 0, 1))  # (B, 17, h, w)
        else:
            mask = F.interpolate(padding_mask.to(latents.dtype), size=latents.shape[2:], mode="nearest")
            x = torch.cat((latents, mask), dim=1)
        return self.proj(x)


class Patchify(nn.Module):
    """(B, c, h, w) -> (B, N, c * patch * patch)"""

    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)


class TimeSinusoid(nn.Module):
    """Noise level in [0, 1], as it is -> fp32 waves (B, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, sigmas: Tensor) -> Tensor:
        return time_sinusoid(sigmas, self.width)


class TimestepEmbedding(nn.Module):
    """(B, D) -> (B, 3D), added to every modulation."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class Block(nn.Module):
    """Self-attention, cross-attention to the context, MLP; each modulated by the noise level. AdaLN-LoRA, arXiv 2501.03575."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.self_attn = DenoiserAttention(config, key_width=config.width)
        self.adaln_modulation_self_attn = modulation(config, 3)
        self.cross_attn = DenoiserAttention(config, key_width=config.context_dim)
        self.adaln_modulation_cross_attn = modulation(config, 3)
        self.mlp = FeedForward(config)
        self.adaln_modulation_mlp = modulation(config, 3)

    def forward(  # noqa: PLR0913  # what the blocks share is computed once, before them
        self, x: Tensor, context: Tensor, time: Tensor, shared: Tensor, rope: RopeTable, log_zeros: Tensor | None = None
    ) -> Tensor:
        """x (B, N, D), context (B, T, C), time (B, D), shared (B, 3D), log_zeros () of the context -> (B, N, D)"""
        shift, scale, gate = split_modulation(self.adaln_modulation_self_attn(time) + shared, 3)
        normed = modulate(x, shift, scale)
        x = gated(x, gate, self.self_attn(normed, normed, rope))
        shift, scale, gate = split_modulation(self.adaln_modulation_cross_attn(time) + shared, 3)
        x = gated(x, gate, self.cross_attn(modulate(x, shift, scale), context, log_zeros=log_zeros))
        shift, scale, gate = split_modulation(self.adaln_modulation_mlp(time) + shared, 3)
        return gated(x, gate, self.mlp(modulate(x, shift, scale)))


class DenoiserAttention(NormedAttention):
    """Rotary positions where a table is given; never a mask."""

    def __init__(self, config: DenoiserConfig, *, key_width: int):
        super().__init__(config.width, key_width=key_width, heads=config.heads, head_dim=config.head_dim)
        self.output_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, source: Tensor, rope: RopeTable | None = None, *, log_zeros: Tensor | None = None) -> Tensor:
        return self.output_proj(self.mix(x, source, None if rope is None else (rope, rope), log_zeros=log_zeros))


class FeedForward(nn.Module):
    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.layer1 = nn.Linear(config.width, config.mlp_hidden, bias=False)
        self.layer2 = nn.Linear(config.mlp_hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.gelu(self.layer1(x)))


class FinalLayer(nn.Module):
    """Tokens -> patches of velocity; inside a patch the order is row, column, channel."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.in_channels * config.patch**2, bias=False)
        self.adaln_modulation = modulation(config, 2)

    def forward(self, x: Tensor, time: Tensor, shared: Tensor) -> Tensor:
        shift, scale = split_modulation(self.adaln_modulation(time) + shared[:, : 2 * x.shape[-1]], 2)
        return self.linear(modulate(x, shift, scale))


def modulation(config: DenoiserConfig, parts: int) -> nn.Sequential:
    """(B, D) -> (B, parts * D). The checkpoint counts a SiLU as layer 0; ``embed_time`` has done it for all."""
    down = nn.Linear(config.width, config.adaln_dim, bias=False)
    return nn.Sequential(nn.Identity(), down, nn.Linear(config.adaln_dim, parts * config.width, bias=False))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return modulated(layer_norm(x), shift, scale)


def grid_angles(config: DenoiserConfig, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, K/2): angles of time (always position 0), row and column, in this order; positions are whole numbers.

    Height and width get K // 6 * 2 channels each, time the rest; a ratio stretches the base (NTK-aware scaling, as published).
    """
    side = config.head_dim // 6 * 2  # channels
    exponent = side / (side - 2)
    row_angles = rope_angles(rows, side, ROPE_THETA * config.rope_h_ratio**exponent, device)
    column_angles = rope_angles(columns, side, ROPE_THETA * config.rope_w_ratio**exponent, device)
    time_pairs = config.head_dim // 2 - side  # an image is frame 0, so the base of the time channels plays no part
    return torch.cat(
        (
            torch.zeros(rows, columns, time_pairs, device=device),
            row_angles[:, None].expand(-1, columns, -1),
            column_angles[None].expand(rows, -1, -1),
        ),
        dim=-1,
    ).flatten(0, 1)
