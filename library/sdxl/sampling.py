"""What drawing a picture with SDXL adds to library/sd/sampling.py: the sizes that the U-Net is told."""

from __future__ import annotations

import torch
from torch import Tensor

from library.sd.sampling import TextInputs
from library.sdxl.sizes import size_vector


def text_inputs(context: Tensor, pooled: Tensor, size_wh: tuple[int, int]) -> TextInputs:
    """context (B, N, C), pooled (B, P), pixels -> the text as the U-Net takes it: of an image of that size, not cropped.

    A prompt and its negative are told the same sizes.
    """
    sizes = torch.tensor([size_wh] * len(pooled))
    return TextInputs(context, size_vector(pooled, sizes, torch.zeros_like(sizes), sizes))
