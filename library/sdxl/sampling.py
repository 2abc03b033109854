"""What drawing a picture with SDXL adds to library/sd/sampling.py: the sizes that the U-Net is told."""

from __future__ import annotations

import torch

from library.sd.sampling import TextInputs
from library.sdxl.sizes import size_vector
from library.sdxl.text import SdxlConditioning


def prompt_inputs(
    positive: SdxlConditioning, negative: SdxlConditioning | None, size_wh: tuple[int, int]
) -> tuple[TextInputs, TextInputs | None]:
    """A prompt and its negative (each B = 1): both are told the size in pixels of the picture, whole and not cropped. A negative
    text that does not act is None."""
    return text_inputs(positive, size_wh), None if negative is None else text_inputs(negative, size_wh)


def text_inputs(text: SdxlConditioning, size_wh: tuple[int, int]) -> TextInputs:
    """Of B texts, for images of that size in pixels."""
    sizes = torch.tensor([size_wh] * len(text.pooled))
    return TextInputs(text.states, size_vector(text.pooled, sizes, torch.zeros_like(sizes), sizes))
