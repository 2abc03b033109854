"""What Anima's models keep in memory while a LoRA is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.anima.layout import DenoiserConfig
from library.nn.memory_use import MemoryUse

if TYPE_CHECKING:
    from library.anima.architecture import AnimaLayouts

LATENT_SIDE_PX = 8


def memory_use(layouts: AnimaLayouts, size_wh: tuple[int, int], images: int, *, text: bool, vae: bool) -> MemoryUse:
    """Of a batch of ``images`` of ``size_wh`` pixels; ``text``, ``vae``: whether these models encode at every step."""
    assert layouts.denoiser is not None
    config = layouts.denoiser.config
    side = LATENT_SIDE_PX * config.patch
    tokens = images * (size_wh[0] // side) * (size_wh[1] // side)
    return MemoryUse(
        blocks=config.blocks,
        kept=kept_values(config, tokens),
        carried=tokens * config.width,
        working=tokens * (2 * config.mlp_hidden + 3 * config.width),  # the MLP's hidden layer twice, what enters and leaves it
        encoders=sum(encoder_values(layouts, text=text, vae=vae)),
    )


def kept_values(config: DenoiserConfig, tokens: int) -> int:
    """What backward needs of one block with a LoRA on all its attention and MLP layers, for so many image tokens.

    Of each token: the MLP's hidden layer before and after its GELU, and 16 vectors as wide as the model: what enters and leaves
    each normalisation, projection, rotation and gate. What belongs to the text or to the noise level is small beside it.
    """
    return tokens * (2 * config.mlp_hidden + 16 * config.width)


def encoder_values(layouts: AnimaLayouts, *, text: bool, vae: bool) -> Iterator[int]:
    """Weights of the encoders in use; of a VAE in a pickle file nothing is known yet."""
    if text and layouts.text is not None:
        yield from (math.prod(shape) for source in layouts.text.sources for shape in source.shapes().values())
    if vae and layouts.vae is not None and layouts.vae.header is not None:
        yield from (math.prod(layouts.vae.header.tensors[key].shape) for key in layouts.vae.names)
