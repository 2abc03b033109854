"""What Anima's models keep in memory while a LoRA is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.anima.layout import VAE_SCALE, DenoiserConfig
from library.anima.text_layout import TextEncoderConfig
from library.nn.decoder_layers import DECODER_FP8_LAYERS
from library.nn.memory_use import LiveEncoders, MemoryUse

if TYPE_CHECKING:
    from library.anima.architecture import AnimaLayouts

CAPTION_TOKENS = 256  # a long caption


def memory_use(layouts: AnimaLayouts, size_wh: tuple[int, int], images: int, live: LiveEncoders) -> MemoryUse:
    """Of a batch of ``images`` of ``size_wh`` pixels."""
    assert layouts.denoiser is not None
    config = layouts.denoiser.config
    side = VAE_SCALE * config.patch
    tokens = images * (size_wh[0] // side) * (size_wh[1] // side)
    return MemoryUse(
        kept=(kept_values(config, tokens),) * config.blocks,
        carried=(tokens * config.width,) * config.blocks,
        working=tokens * (2 * config.mlp_hidden + 3 * config.width),  # the MLP's hidden layer twice, what enters and leaves it
        encoders=sum(encoder_values(layouts, live)),
        **(trained_text_values(layouts.text.config, images) if live.text_is_trained and layouts.text is not None else {}),
    )


def kept_values(config: DenoiserConfig, tokens: int) -> int:
    """What backward needs of one block with a LoRA on all its attention and MLP layers, for so many image tokens.

    Of each token: the MLP's hidden layer before and after its GELU, and 16 vectors as wide as the model: what enters and leaves
    each normalisation, projection, rotation and gate. What belongs to the text or to the noise level is small beside it.
    """
    return tokens * (2 * config.mlp_hidden + 16 * config.width)


def trained_text_values(config: TextEncoderConfig, images: int) -> dict[str, int]:
    """What backward needs of Qwen3 with a LoRA on all its layers, for captions of ``CAPTION_TOKENS``.

    Of each token in a layer: what enters and leaves norms, projections and rotations, and four times the MLP's hidden layer.
    """
    tokens = images * CAPTION_TOKENS
    inner, key_inner = config.heads * config.head_dim, config.key_heads * config.head_dim
    of_one = tokens * (4 * config.mlp_hidden + 6 * config.width + 5 * inner + 2 * key_inner)
    return {"encoder_kept": config.blocks * of_one, "encoder_carried": config.blocks * tokens * config.width + of_one}


def encoder_values(layouts: AnimaLayouts, live: LiveEncoders) -> Iterator[int]:
    """Weights of the encoders in use, those in 8 bits as half; of a VAE in a pickle file nothing is known yet."""
    if live.text and layouts.text is not None:
        shapes = {name: shape for source in layouts.text.sources for name, shape in source.shapes().items()}
        rounded = re.compile(rf"{DECODER_FP8_LAYERS}\.weight") if live.text_in_fp8 else None
        for name, shape in shapes.items():
            yield math.prod(shape) // (2 if rounded and rounded.fullmatch(name) else 1)
    if live.vae and layouts.vae is not None and layouts.vae.header is not None:
        yield from (math.prod(layouts.vae.header.tensors[key].shape) for key in layouts.vae.names)
