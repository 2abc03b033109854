"""Denoiser of Stable Diffusion 3 and 3.5: the MMDiT (arXiv 2403.03206), whose blocks see text and image in one attention.

Names of modules are those of the published checkpoint, without its prefix. SD3.5 norms queries and keys; the first half of the
blocks of SD3.5-medium have a second attention, of the image tokens alone.

B batch · h, w latent rows and columns · T context tokens · N = h/2 * w/2 image tokens · L = T + N
D width · H heads · K head width

The classes MMDiTBlock and SingleDiTBlock bear the names by which third-party network modules find what to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import TrainingError
from library.nn.attention import KernelAttention
from library.nn.blocks import BlockRunner, run_plainly
from library.nn.embeddings import time_sinusoid
from library.nn.modulation import gated, modulated, split_modulation
from library.nn.norms import RmsNorm, layer_norm
from library.nn.patches import unpatchify
from library.sd3.layout import TIME_WIDTH, MmditConfig, position_problem
from library.sd3.positions import ScaledPositions, centre_window, table_side, windows_at


class Mmdit(nn.Module):
    """(noisy latents, noise level, text) -> velocity ``noise - image``."""

    pos_embed: Tensor

    def __init__(self, config: MmditConfig):
        super().__init__()
        self.config = config
        self.run_block: BlockRunner = run_plainly
        self.scaled_positions: ScaledPositions | None = None
        self.register_buffer("pos_embed", torch.zeros(1, config.position_side**2, config.width))
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = Embedding(TIME_WIDTH, config.width)
        self.y_embedder = Embedding(config.pooled_width, config.width)
        self.context_embedder = nn.Linear(config.context_width, config.width)
        self.joint_blocks = nn.ModuleList(MMDiTBlock(config, number) for number in range(config.blocks))
        self.final_layer = FinalLayer(config)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.joint_blocks

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    def forward(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, *, corners: Tensor | None = None
    ) -> Tensor:
        """latents (B, 16, h, w) scaled, timesteps (B,) in 0..1000 with 1000 = pure noise, context (B, T, C), pooled (B, P).

        corners (B, 2) int64 on the latents' device: row and column of the position table where each sample's window begins, from
        0 to ``position_side(h, w)`` less the window's own side; None = all in the middle. h and w are even.
        Returns the velocity, shaped and typed as ``latents``. Raises TrainingError for sizes that the position table cannot hold.
        """
        rows, columns = latents.shape[2] // self.config.patch, latents.shape[3] // self.config.patch
        image = self.x_embedder(latents.to(self.dtype))  # (B, N, D)
        image = image + self.positions(rows, columns, corners).to(image.dtype)
        x = torch.cat((self.context_embedder(context.to(self.dtype)), image), dim=1)  # (B, L, D)
        time = self.embed_time(timesteps, pooled)
        for number, block in enumerate(self.joint_blocks):
            x = self.run_block(number, block, x, time, context.shape[1])
        patches = self.final_layer(x, time)  # (B, N, patch * patch * 16); the last block has left the context out
        return unpatchify(patches, latents.shape, self.config.patch).to(latents.dtype)

    def embed_time(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """timesteps (B,), pooled (B, P) -> what enters every modulation layer (B, D)"""
        sinusoid = time_sinusoid(timesteps, TIME_WIDTH).to(self.dtype)  # computed in fp32
        # Every modulation begins with this SiLU of the same values, so it is done once.
        return F.silu(self.t_embedder(sinusoid) + self.y_embedder(pooled.to(self.dtype)))

    def use_scaled_positions(self, latent_sides: Sequence[int]) -> None:
        """From now on tables made for these resolutions take the place of the checkpoint's (--enable_scaled_pos_embed).

        ``latent_sides``: of the square picture of each training resolution, in latents.
        """
        self.scaled_positions = ScaledPositions([side // self.config.patch for side in latent_sides], self.config.width)

    def position_side(self, height: int, width: int) -> int:
        """Side, in patches, of the square table that the windows of latents of ``height`` x ``width`` are cut from."""
        if self.scaled_positions is None:
            return self.config.position_side
        return table_side(self.scaled_positions.square_side(height // self.config.patch, width // self.config.patch))

    def positions(self, rows: int, columns: int, corners: Tensor | None) -> Tensor:
        """(1, N, D), or (B, N, D) of windows at ``corners``"""
        if self.scaled_positions is not None:
            table = self.scaled_positions.table(self.scaled_positions.square_side(rows, columns), self.pos_embed.device)
        elif problem := position_problem(self.config, rows, columns):
            raise TrainingError(problem)
        else:
            table = self.pos_embed[0]
        return centre_window(table, rows, columns) if corners is None else windows_at(table, corners, rows, columns)


class PatchEmbed(nn.Module):
    """Latents (B, 16, h, w) -> one token per patch (B, N, D)"""

    def __init__(self, config: MmditConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch, stride=config.patch)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class Embedding(nn.Module):
    """(B, inputs) -> (B, D)"""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Heads(NamedTuple):
    """Queries, keys and values of some tokens, (B, n, H, K) each."""

    q: Tensor
    k: Tensor
    v: Tensor


class MMDiTBlock(nn.Module):
    """One attention over context and image tokens, which are otherwise two transformer blocks with weights of their own."""

    def __init__(self, config: MmditConfig, number: int):
        super().__init__()
        self.is_last = number == config.blocks - 1
        self.context_block = SingleDiTBlock(config, gives_keys_only=self.is_last)
        self.x_block = SingleDiTBlock(config, is_dual=number in config.dual_blocks)

    def forward(self, x: Tensor, time: Tensor, tokens: int) -> Tensor:
        """x (B, L, D), of which the first ``tokens`` are the context's, time (B, D) -> the same; of the last block (B, N, D)."""
        context_parts, image_parts = self.context_block.modulations(time), self.x_block.modulations(time)
        sizes = tokens, x.shape[1] - tokens
        context_normed, image_normed = layer_norm(x).split(sizes, dim=1)  # without weights, so one for both
        context_heads = self.context_block.attn.heads_of(modulated(context_normed, *context_parts[:2]))
        image_heads = self.x_block.attn.heads_of(modulated(image_normed, *image_parts[:2]))
        k, v = (torch.cat(pair, dim=1) for pair in zip(context_heads[1:], image_heads[1:], strict=True))  # (B, L, H, K)
        alone = self.x_block.attend_alone(image_normed, image_parts)
        context, image = x.split(sizes, dim=1)
        if self.is_last:
            return self.x_block.rest(image, self.x_block.attn.kernel(image_heads.q, k, v), image_parts, alone)
        mixed = self.x_block.attn.kernel(torch.cat((context_heads.q, image_heads.q), dim=1), k, v)  # (B, L, D)
        context_mixed, image_mixed = mixed.split(sizes, dim=1)
        context = self.context_block.rest(context, context_mixed, context_parts)
        return torch.cat((context, self.x_block.rest(image, image_mixed, image_parts, alone)), dim=1)


class SingleDiTBlock(nn.Module):
    """One stream's half of a block.

    Its modulations: shift, scale and gate of the attention, then of the MLP, then of the second attention where there is one
    (``is_dual``). The context's half of the last block has no gates, as nothing of it is used but keys and values.
    """

    def __init__(self, config: MmditConfig, *, gives_keys_only: bool = False, is_dual: bool = False):
        super().__init__()
        self.parts = 2 if gives_keys_only else 9 if is_dual else 6
        self.attn = AttentionLinears(config, has_proj=not gives_keys_only)
        self.attn2 = AttentionLinears(config) if is_dual else None
        self.mlp = None if gives_keys_only else Mlp(config)
        self.adaLN_modulation = modulation(config.width, self.parts)

    def modulations(self, time: Tensor) -> tuple[Tensor, ...]:
        """time (B, D) -> ``parts`` of (B, 1, D)"""
        return split_modulation(self.adaLN_modulation(time), self.parts)

    def attend_alone(self, normed: Tensor, parts: tuple[Tensor, ...]) -> Tensor | None:
        """What the second attention gives, before its gate: normed (B, N, D) -> (B, N, D), None where there is none."""
        if self.attn2 is None:
            return None
        heads = self.attn2.heads_of(modulated(normed, parts[6], parts[7]))
        return self.attn2.proj(self.attn2.kernel(*heads))

    def rest(self, x: Tensor, mixed: Tensor, parts: tuple[Tensor, ...], alone: Tensor | None = None) -> Tensor:
        """What follows the attention: x, mixed, alone (B, n, D) -> (B, n, D)"""
        assert self.mlp is not None, "this half only gives keys and values"
        x = gated(x, parts[2], self.attn.proj(mixed))
        if alone is not None:
            x = gated(x, parts[8], alone)
        return gated(x, parts[5], self.mlp(modulated(layer_norm(x), parts[3], parts[4])))


class AttentionLinears(nn.Module, KernelAttention):
    """The layers before and after an attention, which a block computes for both of its halves at once."""

    def __init__(self, config: MmditConfig, *, has_proj: bool = True):
        super().__init__()
        self.heads, self._head_dim = config.heads, config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.ln_q = RmsNorm(config.head_dim) if config.qk_norm else None
        self.ln_k = RmsNorm(config.head_dim) if config.qk_norm else None
        if has_proj:
            self.proj = nn.Linear(config.width, config.width)

    @property
    def head_dim(self) -> int:
        return self._head_dim

    def heads_of(self, x: Tensor) -> Heads:
        """x (B, n, D) -> (B, n, H, K) each"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self._head_dim)).unbind(2)
        if self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q), self.ln_k(k)
        return Heads(q, k, v)


class Mlp(nn.Module):
    def __init__(self, config: MmditConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Tokens -> patches of velocity; inside a patch the order is row, column, channel."""

    def __init__(self, config: MmditConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.in_channels * config.patch**2)
        self.adaLN_modulation = modulation(config.width, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(modulated(layer_norm(x), *split_modulation(self.adaLN_modulation(time), 2)))


def modulation(width: int, parts: int) -> nn.Sequential:
    """(B, D) -> (B, parts * D). The checkpoint counts a SiLU as layer 0; ``embed_time`` has done it for all."""
    return nn.Sequential(nn.Identity(), nn.Linear(width, parts * width))
