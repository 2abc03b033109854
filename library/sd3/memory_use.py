"""What the models of Stable Diffusion 3 keep in memory while a LoRA is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from library.files.weights_source import changed_shape
from library.nn.memory_use import LiveEncoders, MemoryUse
from library.sd.layout import StableDiffusionLayouts
from library.sd.memory_use import TEXT_ROWS, encoder_values, trained_text_values
from library.sd3.layout import PIXELS_PER_LATENT, MmditConfig, Sd3Layouts
from library.sd3.t5 import FP8_LAYERS
from library.sd3.t5_layout import T5Config

# of each token in a block, in widths of the model: what enters and leaves two norms and two modulations, q, k and v, the results
# of the attention and of the layer after it
TOKEN_WIDTHS = 12
NORM_WIDTHS = 3  # besides, where queries and keys are normed
DUAL_WIDTHS = 8  # besides, of each image token in a block with a second attention


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Use:
    """Whether the T5 runs at every step on the denoiser's device, and is trained; ``tokens`` of a caption."""

    runs: bool = True
    is_trained: bool = False
    tokens: int = 256


def memory_use(
    layouts: Sd3Layouts, size_wh: tuple[int, int], images: int, live: LiveEncoders, t5: T5Use | None = None
) -> MemoryUse:
    """Of a batch of ``images`` of ``size_wh`` pixels. ``t5``: None = it goes the way of the CLIPs."""
    assert layouts.denoiser is not None
    config = layouts.denoiser.config
    t5 = T5Use() if t5 is None else t5
    side = PIXELS_PER_LATENT * config.patch
    image = images * (size_wh[0] // side) * (size_wh[1] // side)
    context = images * (TEXT_ROWS + t5.tokens)
    return MemoryUse(
        kept=tuple(kept_values(config, number, context=context, image=image) for number in range(config.blocks)),
        carried=((context + image) * config.width,) * config.blocks,
        # the MLP's hidden layer twice, what enters and leaves it
        working=max(context, image) * (2 * config.mlp_hidden + 3 * config.width),
        encoders=sum(weights_in_use(layouts, live, t5)),
        **trained_values(layouts, images, live, t5),
    )


def kept_values(config: MmditConfig, number: int, *, context: int, image: int) -> int:
    """What backward needs of a block with a LoRA on all its layers, for so many tokens of both kinds; the last block, whose
    context half only gives keys and values, counts as the others do."""
    widths = TOKEN_WIDTHS + NORM_WIDTHS * config.qk_norm
    of_both = (context + image) * (2 * config.mlp_hidden + widths * config.width)
    return of_both + (image * DUAL_WIDTHS * config.width if number in config.dual_blocks else 0)


def trained_values(layouts: Sd3Layouts, images: int, live: LiveEncoders, t5: T5Use) -> dict[str, int]:
    """What backward needs of the text encoders."""
    if not live.text_is_trained or layouts.text is None:
        return {}
    found = trained_text_values(clips_and_vae(layouts), images)
    if t5.is_trained and layouts.text.t5 is not None:
        config = layouts.text.t5.config
        of_layer = t5_layer_values(config, images * t5.tokens)
        carried = 2 * config.layers * images * t5.tokens * config.width  # twice as wide as the model's numbers, as float32
        found = {
            "encoder_kept": found["encoder_kept"] + config.layers * of_layer,
            "encoder_carried": found["encoder_carried"] + carried + of_layer,
        }
    return found


def t5_layer_values(config: T5Config, tokens: int) -> int:
    """What backward needs of one layer with a LoRA on its projections: of each token what enters two norms, in float32, and
    what leaves them, q, k, v and the attention's result, and the MLP's halves, the GELU of one, and their product."""
    inner = config.heads * config.head_dim
    return tokens * (6 * config.width + 4 * inner + 4 * config.mlp_width)


def weights_in_use(layouts: Sd3Layouts, live: LiveEncoders, t5: T5Use) -> Iterator[int]:
    """Weights of the encoders in use, those in 8 bits as half."""
    yield from encoder_values(clips_and_vae(layouts), live)
    part = None if layouts.text is None else layouts.text.t5
    if not live.text or not t5.runs or part is None:
        return
    rounded = re.compile(rf"{FP8_LAYERS}\.weight") if live.text_in_fp8 else None
    for name, piece in part.pieces.items():
        size = math.prod(changed_shape(part.source.shapes[piece.key], piece.change))
        yield size // (2 if rounded and rounded.fullmatch(name) else 1)


def clips_and_vae(layouts: Sd3Layouts) -> StableDiffusionLayouts:
    """As Stable Diffusion's layouts, which have a rule for them."""
    text = layouts.text
    return StableDiffusionLayouts(text=() if text is None else (text.clip_l, text.clip_g), vae=layouts.vae)
