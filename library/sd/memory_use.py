"""What the models of Stable Diffusion and SDXL keep in memory while a LoRA is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.files.weights_source import Part, changed_shape
from library.nn.memory_use import LiveEncoders, MemoryUse
from library.sd.layout import StableDiffusionLayouts
from library.sd.unet_names import UNetConfig, resnets, transformers

if TYPE_CHECKING:
    from library.sd.clip_layout import ClipConfig

PIXELS_PER_LATENT = 8
TEXT_ROWS = 77
# of each token in a transformer block, in widths of the level: what enters the three norms, what leaves them, q, k, v and the
# result of self-attention, q and the result of cross-attention, and the feed-forward's hidden layer of 4 (its two halves,
# the GELU of one, their product)
TOKEN_WIDTHS = 3 + 3 + 4 + 2 + 4 * 4
TOKEN_GRADIENT_WIDTHS = 15  # of these, what is there at once while the feed-forward goes backward
CLIP_MATRICES = re.compile(r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight")  # what --fp8_base keeps in 8 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A residual block, or a spatial transformer."""

    channels_in: int
    channels: int
    depth: int  # of a spatial transformer, in blocks; 0 = a residual block
    pixels: int  # of all images


def memory_use(layouts: StableDiffusionLayouts, size_wh: tuple[int, int], images: int, live: LiveEncoders) -> MemoryUse:
    """Of a batch of ``images`` of ``size_wh`` pixels, with LoRAs on the spatial transformers."""
    assert layouts.denoiser is not None
    config = layouts.denoiser.config
    found = [*trained_layers(config, size_wh, images)]
    return MemoryUse(
        kept=tuple(values for layer in found for values in kept_values(layer, images)),
        carried=tuple(values for layer in found for values in carried_values(layer)),
        outside=sum(map(transformer_values, found)) + step_values(config, size_wh, images),
        working=max(map(gradient_values, found)),
        encoders=sum(encoder_values(layouts, live)),
        **(trained_text_values(layouts, images) if live.text_is_trained else {}),
    )


def trained_layers(config: UNetConfig, size_wh: tuple[int, int], images: int) -> Iterator[Layer]:
    """In the order of the forward pass, from the first one with a transformer on: nothing is kept of those before."""
    depths = {name: depth for name, _, depth in transformers(config)}
    pixels, reached = pixels_of_levels(config, size_wh, images), False
    for name, channels_in, channels in resnets(config):
        depth = depths.get(name.replace(".resnets.", ".attentions."), 0)
        if reached:
            yield Layer(channels_in=channels_in, channels=channels, depth=0, pixels=pixels[_level(config, name)])
        if depth:
            yield Layer(channels_in=channels, channels=channels, depth=depth, pixels=pixels[_level(config, name)])
        reached = reached or depth > 0


def _level(config: UNetConfig, name: str) -> int:
    kind, place, *_ = name.split(".")
    if kind == "mid_block":
        return config.levels - 1
    return int(place) if kind == "down_blocks" else config.levels - 1 - int(place)


def pixels_of_levels(config: UNetConfig, size_wh: tuple[int, int], images: int) -> list[int]:
    """Latent pixels of all images, on each level."""
    width, height = (side // PIXELS_PER_LATENT for side in size_wh)
    return [images * math.ceil(width / 2**level) * math.ceil(height / 2**level) for level in range(config.levels)]


def kept_values(layer: Layer, images: int) -> Iterator[int]:
    """What backward needs of each block: of a residual one what enters norms, SiLUs and convolutions."""
    if layer.depth:
        of_text = 2 * images * TEXT_ROWS * layer.channels  # k and v
        yield from [layer.pixels * TOKEN_WIDTHS * layer.channels + of_text] * layer.depth
    else:
        yield 3 * layer.pixels * (layer.channels_in + layer.channels)


def carried_values(layer: Layer) -> Iterator[int]:
    """What enters each block."""
    yield from [layer.pixels * layer.channels_in] * max(layer.depth, 1)


def transformer_values(layer: Layer) -> int:
    """Around the blocks of a spatial transformer: what enters and leaves its norm, what enters proj_out."""
    return 3 * layer.pixels * layer.channels if layer.depth else 0


def step_values(config: UNetConfig, size_wh: tuple[int, int], images: int) -> int:
    """What enters the convolutions between levels, and what leaves the last block until it is a prediction."""
    pixels = pixels_of_levels(config, size_wh, images)
    first = next(level for level, depth in enumerate([*config.depths, 1]) if depth)  # where the first transformer is
    down = sum(pixels[level] * config.widths[level] for level in range(first, config.levels - 1))
    up = sum(pixels[level - 1] * config.widths[level] for level in range(1, config.levels))
    return down + up + 3 * pixels[0] * config.widths[0]


def gradient_values(layer: Layer) -> int:
    """There at once while one of its blocks goes backward."""
    if layer.depth:
        return TOKEN_GRADIENT_WIDTHS * layer.pixels * layer.channels
    return 2 * layer.pixels * (layer.channels_in + layer.channels)


# ---------------------------------------------------------------- text encoders and VAE


def trained_text_values(layouts: StableDiffusionLayouts, images: int) -> dict[str, int]:
    """What backward needs of the text encoders with a LoRA on all their layers, for captions of one chunk of tokens."""
    kept = [values_of_clip_layer(part.config, images) for part in layouts.text]
    carried = sum(part.config.layers * images * TEXT_ROWS * part.config.width for part in layouts.text)
    total = sum(part.config.layers * values for part, values in zip(layouts.text, kept, strict=True))
    return {"encoder_kept": total, "encoder_carried": carried + max(kept, default=0)}


def values_of_clip_layer(config: ClipConfig, images: int) -> int:
    """Of each token: what enters and leaves two norms, q, k, v and the result of attention, and the MLP's hidden layer before and
    after its activation; quick_gelu, x * sigmoid(1.7 x), keeps its sigmoid, too."""
    hidden = 3 if config.activation == "quick_gelu" else 2
    return images * TEXT_ROWS * (8 * config.width + hidden * config.mlp_width)


def encoder_values(layouts: StableDiffusionLayouts, live: LiveEncoders) -> Iterator[int]:
    """Weights of the encoders in use, those in 8 bits as half."""
    if live.text:
        for part in layouts.text:
            for name, size in _weights(part):
                yield size // (2 if live.text_in_fp8 and CLIP_MATRICES.fullmatch(name) else 1)
    if live.vae and layouts.vae is not None:
        yield from (size for _, size in _weights(layouts.vae))


def _weights(part: Part) -> Iterator[tuple[str, int]]:  # type: ignore[type-arg]
    """(name in the module, number of values) of each tensor that is loaded."""
    for name, piece in part.pieces.items():
        yield name, math.prod(changed_shape(part.source.shapes[piece.key], piece.change))
