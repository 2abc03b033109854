"""What drawing a picture takes from Lumina Image 2.0: the denoiser's velocity, in the count of time and with the sign that
samplers want.

The way from noise to image is that of every flow model: library/sampling/flow_samplers.py, with the schedule ``even``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from library.lumina.denoiser import NextDit
from library.lumina.text import LuminaConditioning

SCHEDULE = "even"  # of library/sampling/flow_samplers.py


def velocity_of(denoiser: NextDit) -> Callable[[Tensor, Tensor, LuminaConditioning], Tensor]:
    """The denoiser as samplers call it: (latents (B, 16, h, w), sigmas (B,), text of B captions) -> velocity, noise - image.

    The denoiser's time is 0 at noise and 1 at the image, and what it predicts points that way.
    """
    return lambda latents, sigmas, text: -denoiser(latents, 1 - sigmas, text.states, text.lengths)


def repeated(text: LuminaConditioning, images: int, *, dtype: torch.dtype) -> LuminaConditioning:
    """The only text for each of ``images``, in the number format of the denoiser, which may be another than Gemma's."""
    return LuminaConditioning(text.states.to(dtype).expand(images, -1, -1), lengths=text.lengths * images)
