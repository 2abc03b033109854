"""What drawing a picture takes from Stable Diffusion 3: the text as the denoiser wants it, and the noise level in its count.

The way from noise to image is that of every flow model: library/sampling/flow_samplers.py, with the schedule ``table``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from library.sd3.denoiser import Mmdit
from library.sd3.text import Sd3Conditioning

SCHEDULE = "table"  # of library/sampling/flow_samplers.py
TIMESTEPS = 1000  # the denoiser's count of the noise level: 1000 = pure noise


@dataclass(frozen=True, slots=True, eq=False)
class TextInputs:
    """The text as the denoiser takes it."""

    context: Tensor  # (B, 77 + T, C)
    pooled: Tensor  # (B, P)

    def repeated(self, images: int) -> TextInputs:
        """The only text for each of ``images``."""
        return TextInputs(self.context.expand(images, -1, -1), self.pooled.expand(images, -1))


def text_inputs(denoiser: Mmdit, text: Sd3Conditioning) -> TextInputs:
    """Of the text conditioning of B captions."""
    return TextInputs(text.context(denoiser.config.context_width), text.pooled)


def velocity_of(denoiser: Mmdit) -> Callable[[Tensor, Tensor, TextInputs], Tensor]:
    """The denoiser as samplers call it: (latents (B, 16, h, w), sigmas (B,), text) -> velocity."""
    return lambda latents, sigmas, text: denoiser(latents, sigmas * TIMESTEPS, text.context, text.pooled)
