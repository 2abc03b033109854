"""The U-Net of Stable Diffusion 1.x, 2.x and SDXL (arXiv 2112.10752, 2307.01952): diffusers' modules, called by ``predict``.

B batch · h, w latent rows and columns, halved from level to level · C channels of a level · N = h * w tokens of it
T context rows · K context width · E width of the time embedding

Importing this imports diffusers, so only ``library.sd.denoiser.build_unet`` does.

diffusers' own ``forward`` still works. ``predict`` leaves out what training does not need of it, and hands every block to
``run_block``. Two kinds of modules have a leaner forward than diffusers': attention, whose kernel can be changed, and residual
blocks. The classes keep the names by which network modules, third-party ones included, find what to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor, resnet
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from library.nn.attention import KernelAttention
from library.nn.blocks import BlockRunner, run_plainly
from library.nn.embeddings import time_sinusoid
from library.sd.unet_names import UNetConfig

Run = Callable[..., Tensor]  # run(block, x, *inputs)


class StableDiffusionUNet(UNet2DConditionModel):
    """(noisy latents, timestep, context) -> what the model predicts: the noise, or the velocity."""

    def __init__(self, sizes: UNetConfig):
        super().__init__(**diffusers_config(sizes))
        self.sizes = sizes
        self.run_block: BlockRunner = run_plainly
        for module in list(self.modules()):
            _make_lean(module)

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual blocks and transformer blocks, in the order in which ``predict`` calls them."""
        return [block for layer in self._layers() for block in layer]

    def predict(self, latents: Tensor, timesteps: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        """latents (B, 4, h, w) noisy, timesteps (B,) from 0 to 999, context (B, T, K), vector (B, V) where the model takes one.

        h and w may be any: on the way up the picture gets the sizes that it had on the way down.
        Returns the prediction, shaped and typed as ``latents``.
        """
        numbers, dtype = count(), self.conv_in.weight.dtype

        def run(block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
            return self.run_block(next(numbers), block, x, *inputs)

        time = self.embed_time(timesteps, vector)  # (B, E)
        context = context.to(dtype)
        x, skips = self._down(run, self.conv_in(latents.to(dtype)), time, context)
        x = self._middle(run, x, time, context)
        x = self._up(run, x, time, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x))).to(latents.dtype)

    def embed_time(self, timesteps: Tensor, vector: Tensor | None) -> Tensor:
        """timesteps (B,), vector (B, V) -> (B, E)"""
        assert (vector is not None) == bool(self.sizes.vector_width), f"this model takes a vector of {self.sizes.vector_width}"
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(time_sinusoid(timesteps, self.sizes.widths[0]).to(dtype))
        return time if vector is None else time + self.add_embedding(vector.to(dtype))

    def _down(self, run: Run, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, h, w) of the finest level -> that of the coarsest, and what the way up is given again."""
        skips = [x]
        level: Any
        for level in self.down_blocks:
            for residual, transformer in layers(level):
                x = run(residual, x, time)
                x = x if transformer is None else transform(run, transformer, x, context)
                skips.append(x)
            if level.downsamplers is not None:
                x = level.downsamplers[0](x)  # (B, C, ceil(h / 2), ceil(w / 2))
                skips.append(x)
        return x, skips

    def _middle(self, run: Run, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        middle: Any = self.mid_block
        x = transform(run, middle.attentions[0], run(middle.resnets[0], x, time), context)
        return run(middle.resnets[1], x, time)

    def _up(self, run: Run, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        level: Any
        for level in self.up_blocks:
            for residual, transformer in layers(level):
                x = run(residual, torch.cat((x, skips.pop()), dim=1), time)
                x = x if transformer is None else transform(run, transformer, x, context)
            if level.upsamplers is not None:
                x = level.upsamplers[0](x, skips[-1].shape[2:])
        return x

    def _layers(self) -> Iterator[tuple[nn.Module, ...]]:
        for level in self.down_blocks:
            yield from (_blocks_of(*layer) for layer in layers(level))
        middle: Any = self.mid_block
        yield _blocks_of(middle.resnets[0], middle.attentions[0])
        yield (middle.resnets[1],)
        for level in self.up_blocks:
            yield from (_blocks_of(*layer) for layer in layers(level))


def layers(level: Any) -> Iterator[tuple[nn.Module, Any]]:
    """(residual block, spatial transformer or None) of one level, one way."""
    transformers = getattr(level, "attentions", None)  # levels without attention have no such list
    return zip(level.resnets, transformers or [None] * len(level.resnets), strict=True)


def _blocks_of(residual: nn.Module, transformer: Any) -> tuple[nn.Module, ...]:
    return (residual, *(() if transformer is None else transformer.transformer_blocks))


def transform(run: Run, transformer: Any, x: Tensor, context: Tensor) -> Tensor:
    """A spatial transformer, whose blocks see pixels as tokens: x (B, C, h, w) -> (B, C, h, w)"""
    hidden = transformer.norm(x)
    if transformer.use_linear_projection:
        tokens = transformer.proj_in(as_tokens(hidden))  # (B, N, C)
    else:
        tokens = as_tokens(transformer.proj_in(hidden))
    for block in transformer.transformer_blocks:
        tokens = run(block, tokens, None, context)  # None: no mask
    if transformer.use_linear_projection:
        return x + as_picture(transformer.proj_out(tokens), x.shape)
    return x + transformer.proj_out(as_picture(tokens, x.shape))


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C)"""
    return x.flatten(2).transpose(1, 2)


def as_picture(tokens: Tensor, shape: torch.Size) -> Tensor:
    """tokens (B, N, C) -> ``shape`` (B, C, h, w)"""
    return tokens.transpose(1, 2).reshape(shape)


# ---------------------------------------------------------------- leaner forwards


class UNetAttention(attention_processor.Attention, KernelAttention):
    """diffusers' attention without its choice of processors, masks and norms, none of which these models have."""

    @property
    def head_dim(self) -> int:
        return self.inner_dim // self.heads

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None) -> Tensor:  # type: ignore[override]
        """x (B, N, C) attends to encoder_hidden_states (B, T, K), or to itself -> (B, N, C). There are no masks."""
        assert attention_mask is None
        source = x if encoder_hidden_states is None else encoder_hidden_states
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # (B, N, heads, head width)
        k = self.to_k(source).unflatten(-1, (self.heads, -1))  # type: ignore[misc]
        v = self.to_v(source).unflatten(-1, (self.heads, -1))  # type: ignore[misc]
        return self.to_out[0](self.kernel(q, k, v))  # type: ignore[index]


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Two convolutions beside a shortcut, with the time between them."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, C in, h, w), time (B, E) -> (B, C out, h, w)"""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]  # type: ignore[misc]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class TimeEmbedding(TimestepEmbedding):
    """diffusers' module under a name of its own: LyCORIS looks for its layers by their names and by diffusers' class name, and
    would take them twice."""


def _make_lean(module: nn.Module) -> None:
    """In place: the objects and the names of their weights stay."""
    if type(module) is attention_processor.Attention:
        module.__class__ = UNetAttention
    elif type(module) is resnet.ResnetBlock2D:
        module.__class__ = ResnetBlock2D
    elif type(module) is TimestepEmbedding:
        module.__class__ = TimeEmbedding
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout) and child.p == 0.0:  # in training mode it would compute something all the same
            setattr(module, name, nn.Identity())


def diffusers_config(sizes: UNetConfig) -> dict[str, Any]:
    """The arguments of diffusers' class. Depths count only where there is attention; the last one is that of the middle, too."""
    downs = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in sizes.depths]
    ups = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(sizes.depths)]
    config: dict[str, Any] = {
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "down_block_types": tuple(downs),
        "up_block_types": tuple(ups),
        "block_out_channels": sizes.widths,
        "layers_per_block": sizes.layers,
        "norm_num_groups": sizes.norm_groups,
        "cross_attention_dim": sizes.context_width,
        "transformer_layers_per_block": (*(max(depth, 1) for depth in sizes.depths[:-1]), sizes.middle_depth),
        "attention_head_dim": sizes.heads,  # diffusers' name for the number of heads
        "use_linear_projection": sizes.linear_projections,
        "time_embedding_dim": sizes.time_width,
    }
    if sizes.vector_width:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,  # of diffusers' own forward: waves of each of the six sizes
            "projection_class_embeddings_input_dim": sizes.vector_width,
        }
    return config
