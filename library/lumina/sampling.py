"""What drawing a picture takes from Lumina Image 2.0: the text as the denoiser wants it, time in its count, and the velocity
with the sign that samplers want.

The way from noise to image is that of every flow model: library/sampling/flow_samplers.py, with the schedule ``even``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from library.lumina.denoiser import NextDit

SCHEDULE = "even"  # of library/sampling/flow_samplers.py


@dataclass(frozen=True, slots=True, eq=False)
class TextInputs:
    """The text as the denoiser takes it."""

    states: Tensor  # (B, T, C)
    lengths: Sequence[int]  # rows of each caption that count

    def repeated(self, images: int) -> TextInputs:
        """The only text for each of ``images``."""
        return TextInputs(self.states.expand(images, -1, -1), list(self.lengths) * images)


def velocity_of(denoiser: NextDit) -> Callable[[Tensor, Tensor, TextInputs], Tensor]:
    """The denoiser as samplers call it: (latents (B, 16, h, w), sigmas (B,), text) -> velocity, noise - image.

    The denoiser's time is 0 at noise and 1 at the image, and what it predicts points that way.
    """
    return lambda latents, sigmas, text: -denoiser(latents, 1 - sigmas, text.states, text.lengths)
