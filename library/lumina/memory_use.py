"""What Lumina Image 2.0's models keep in memory while a LoRA is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from library.files.weights_source import Part, changed_shape
from library.lumina.gemma_layout import GemmaConfig
from library.lumina.layout import LuminaLayouts, NextDitConfig
from library.lumina.source import TOKENS
from library.nn.decoder_layers import DECODER_FP8_LAYERS
from library.nn.memory_use import LiveEncoders, MemoryUse

VAE_SCALE = 8  # pixels of a latent


def memory_use(layouts: LuminaLayouts, size_wh: tuple[int, int], images: int, live: LiveEncoders) -> MemoryUse:
    """Of a batch of ``images`` of ``size_wh`` pixels, with captions as long as they may be. The refiners count as blocks."""
    assert layouts.denoiser is not None
    config = layouts.denoiser.config
    side = VAE_SCALE * config.patch
    caption = images * (TOKENS if layouts.tokenizer is None else layouts.tokenizer.max_tokens)
    image = images * (size_wh[0] // side) * (size_wh[1] // side)
    counts = ((config.context_refiners, caption), (config.noise_refiners, image), (config.blocks, caption + image))
    tokens = [rows for blocks, rows in counts for _ in range(blocks)]
    return MemoryUse(
        kept=tuple(kept_values(config, rows) for rows in tokens),
        carried=tuple(rows * config.width for rows in tokens),
        # gradients of the MLP's two halves and of their product, and what enters and leaves it
        working=(caption + image) * (3 * config.mlp_hidden + 3 * config.width),
        encoders=sum(encoder_values(layouts, live)),
        **(
            trained_text_values(layouts.text.config, caption, images) if live.text_is_trained and layouts.text is not None else {}
        ),
    )


def kept_values(config: NextDitConfig, tokens: int) -> int:
    """What backward needs of one block with a LoRA on all its layers, for so many tokens.

    Of each token: the MLP's two halves and their product; 10 vectors as wide as the model, which enter and leave norms, scales
    and gates; the queries before and after their rotation, and attention's result; keys likewise, and values.
    """
    inner, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return tokens * (3 * config.mlp_hidden + 10 * config.width + 3 * inner + 3 * keys)


def trained_text_values(config: GemmaConfig, tokens: int, captions: int) -> dict[str, int]:
    """What backward needs of Gemma with a LoRA on all its layers, for ``tokens`` of all ``captions`` together.

    Of each token in a layer: four times the MLP's hidden layer; 10 vectors as wide as the model, which enter and leave its norms;
    4 as wide as all heads; and 4 numbers for each head and token that it sees, as the soft cap leaves no fused attention.
    """
    seen = tokens // max(captions, 1)
    of_one = tokens * (4 * config.mlp_hidden + 10 * config.width + 4 * config.heads * config.head_dim + 4 * config.heads * seen)
    return {
        "encoder_kept": config.used_blocks * of_one,
        "encoder_carried": config.used_blocks * tokens * config.width + of_one,
    }


def encoder_values(layouts: LuminaLayouts, live: LiveEncoders) -> Iterator[int]:
    """Weights of the encoders in use, those in 8 bits as half."""
    if live.text and layouts.text is not None:
        rounded = re.compile(rf"{DECODER_FP8_LAYERS}\.weight") if live.text_in_fp8 else None
        for name, size in _weights(layouts.text):
            yield size // (2 if rounded and rounded.fullmatch(name) else 1)
    if live.vae and layouts.vae is not None:
        yield from (size for _, size in _weights(layouts.vae))


def _weights(part: Part[Any]) -> Iterator[tuple[str, int]]:
    """(name in the module, number of values) of each tensor that is loaded."""
    for name, piece in part.pieces.items():
        yield name, math.prod(changed_shape(part.source.shapes[piece.key], piece.change))
