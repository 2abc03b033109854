"""The U-Net of Stable Diffusion 1.x, 2.x and SDXL by name: every tensor of diffusers' module with its shape, and what its module
is called in a checkpoint of the original layout. Needs no torch.

Both layouts hold the same modules. The original one counts blocks through all levels; what follows a residual block (attention,
then going up) has the next numbers within that block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]

HEAD = {  # outside the levels: diffusers' module -> the original one
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {  # within a residual block
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """Sizes of a U-Net. Levels go from the finest to the coarsest."""

    widths: tuple[int, ...]  # channels on each level
    depths: tuple[int, ...]  # transformer blocks behind each residual block of a level; 0 = no attention there
    middle_depth: int
    heads: tuple[int, ...]  # of attention on each level; the last holds for the middle, too
    context_width: int  # channels of the text states
    vector_width: int = 0  # of the pooled text and the size embedding; 0 = the model has none
    time_width: int  # of the time embedding
    layers: int = 2  # residual blocks of a level on the way down; one more on the way up
    in_channels: int = 4
    out_channels: int = 4
    norm_groups: int = 32
    linear_projections: bool = False  # proj_in and proj_out of the transformers are Linears instead of 1x1 convolutions

    @property
    def levels(self) -> int:
        return len(self.widths)

    @property
    def blocks(self) -> int:
        """Residual blocks and transformer blocks: what ``StableDiffusionUNet.run_block`` is asked to call."""
        both_ways = 2 * self.layers + 1
        return both_ways * (self.levels + sum(self.depths)) + 2 + self.middle_depth


def original_prefixes(config: UNetConfig) -> dict[str, str]:
    """diffusers' name of each residual block, spatial transformer and step between levels -> the original one."""
    return {
        **_down_prefixes(config),
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        **_up_prefixes(config),
    }


def _down_prefixes(config: UNetConfig) -> dict[str, str]:
    names, number = {}, 1  # 0 is conv_in
    for level in range(config.levels):
        for layer in range(config.layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if config.depths[level]:
                names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level < config.levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    return names


def _up_prefixes(config: UNetConfig) -> dict[str, str]:
    names, number = {}, 0
    for place, level in enumerate(reversed(range(config.levels))):
        for layer in range(config.layers + 1):
            names[f"up_blocks.{place}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if config.depths[level]:
                names[f"up_blocks.{place}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if level > 0:
            behind = 2 if config.depths[level] else 1
            names[f"up_blocks.{place}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{behind}.conv"
    return names


def original_names(config: UNetConfig) -> dict[str, str]:
    """diffusers' path of every module that has weights -> its path in the original layout, without the prefix of a checkpoint."""
    prefixes = original_prefixes(config)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in expected_shapes(config))
    return {module: _original_name(module, prefixes) for module in modules}


def _original_name(module: str, prefixes: dict[str, str]) -> str:
    if module in HEAD:
        return HEAD[module]
    if module in prefixes:
        return prefixes[module]
    parts = module.split(".")
    length = 3 if parts[0] == "mid_block" else 4  # of a block's name
    block, rest = ".".join(parts[:length]), ".".join(parts[length:])
    return f"{prefixes[block]}.{RESNET.get(rest, rest)}"


# ---------------------------------------------------------------- shapes


def expected_shapes(config: UNetConfig) -> Shapes:
    """Every name and shape of diffusers' ``UNet2DConditionModel`` of these sizes."""
    first, time = config.widths[0], config.time_width
    shapes: Shapes = {
        **_layer("conv_in", (first, config.in_channels, 3, 3)),
        **_layer("time_embedding.linear_1", (time, first)),
        **_layer("time_embedding.linear_2", (time, time)),
        **_layer("conv_norm_out", (first,)),
        **_layer("conv_out", (config.out_channels, first, 3, 3)),
    }
    if config.vector_width:
        shapes |= _layer("add_embedding.linear_1", (time, config.vector_width)) | _layer("add_embedding.linear_2", (time, time))
    for name, channels_in, channels_out in resnets(config):
        shapes |= _resnet(name, channels_in, channels_out, time)
    for name, width, depth in transformers(config):
        shapes |= _transformer(name, width, depth, config)
    for name, width in steps_between_levels(config):
        shapes |= _layer(name, (width, width, 3, 3))
    return shapes


def resnets(config: UNetConfig) -> Iterator[tuple[str, int, int]]:
    """(name, channels in, channels out) of each residual block, in the order of the forward pass."""
    widths = config.widths
    for level, width in enumerate(widths):
        for layer in range(config.layers):
            yield f"down_blocks.{level}.resnets.{layer}", widths[max(level - 1, 0)] if layer == 0 else width, width
    yield "mid_block.resnets.0", widths[-1], widths[-1]
    yield "mid_block.resnets.1", widths[-1], widths[-1]
    for place, level in enumerate(reversed(range(config.levels))):
        width, below = widths[level], widths[min(level + 1, config.levels - 1)]
        for layer in range(config.layers + 1):
            skip = widths[max(level - 1, 0)] if layer == config.layers else width  # what the way down left there
            yield f"up_blocks.{place}.resnets.{layer}", (below if layer == 0 else width) + skip, width


def transformers(config: UNetConfig) -> Iterator[tuple[str, int, int]]:
    """(name, width, transformer blocks) of each spatial transformer, in the order of the forward pass."""
    for level, depth in enumerate(config.depths):
        for layer in range(config.layers if depth else 0):
            yield f"down_blocks.{level}.attentions.{layer}", config.widths[level], depth
    yield "mid_block.attentions.0", config.widths[-1], config.middle_depth
    for place, level in enumerate(reversed(range(config.levels))):
        for layer in range(config.layers + 1 if config.depths[level] else 0):
            yield f"up_blocks.{place}.attentions.{layer}", config.widths[level], config.depths[level]


def steps_between_levels(config: UNetConfig) -> Iterator[tuple[str, int]]:
    """(name, width) of the convolutions that halve and double the picture's sides."""
    for level in range(config.levels - 1):
        yield f"down_blocks.{level}.downsamplers.0.conv", config.widths[level]
    for place in range(config.levels - 1):
        yield f"up_blocks.{place}.upsamplers.0.conv", config.widths[config.levels - 1 - place]


def _layer(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _resnet(name: str, channels_in: int, channels_out: int, time: int) -> Shapes:
    shapes = {
        **_layer(f"{name}.norm1", (channels_in,)),
        **_layer(f"{name}.conv1", (channels_out, channels_in, 3, 3)),
        **_layer(f"{name}.time_emb_proj", (channels_out, time)),
        **_layer(f"{name}.norm2", (channels_out,)),
        **_layer(f"{name}.conv2", (channels_out, channels_out, 3, 3)),
    }
    return shapes if channels_in == channels_out else shapes | _layer(f"{name}.conv_shortcut", (channels_out, channels_in, 1, 1))


def _transformer(name: str, width: int, depth: int, config: UNetConfig) -> Shapes:
    projection = (width, width) if config.linear_projections else (width, width, 1, 1)
    shapes = {
        **_layer(f"{name}.norm", (width,)),
        **_layer(f"{name}.proj_in", projection),
        **_layer(f"{name}.proj_out", projection),
    }
    for number in range(depth):
        shapes |= _transformer_block(f"{name}.transformer_blocks.{number}", width, config.context_width)
    return shapes


def _transformer_block(name: str, width: int, context_width: int) -> Shapes:
    shapes: Shapes = {}
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= _layer(f"{name}.{norm}", (width,))
    for attention, source in (("attn1", width), ("attn2", context_width)):
        shapes[f"{name}.{attention}.to_q.weight"] = (width, width)
        shapes[f"{name}.{attention}.to_k.weight"] = (width, source)
        shapes[f"{name}.{attention}.to_v.weight"] = (width, source)
        shapes |= _layer(f"{name}.{attention}.to_out.0", (width, width))
    return shapes | _layer(f"{name}.ff.net.0.proj", (8 * width, width)) | _layer(f"{name}.ff.net.2", (width, 4 * width))
