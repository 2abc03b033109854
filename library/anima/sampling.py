"""What drawing a picture takes from Anima: the text as the denoiser wants it.

The way from noise to image is that of every flow model: library/sampling/flow_samplers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from library.anima.denoiser import AnimaDenoiser
from library.anima.text import AnimaConditioning


@dataclass(frozen=True, slots=True, eq=False)
class TextContext:
    """The text as the denoiser takes it."""

    context: Tensor  # (B, 512, C)
    used_rows: int  # from this row on the context is zero

    def repeated(self, images: int) -> TextContext:
        """The only text for each of ``images``."""
        return TextContext(self.context.expand(images, -1, -1), self.used_rows)


def encode_context(denoiser: AnimaDenoiser, text: AnimaConditioning) -> TextContext:
    """What the LLM adapter makes of the text conditioning of B captions."""
    return TextContext(denoiser.encode_context(*text.adapter_inputs), text.used_rows)


def velocity_of(denoiser: AnimaDenoiser) -> Callable[[Tensor, Tensor, TextContext], Tensor]:
    """The denoiser as samplers call it: (latents (B, 16, h, w), sigmas (B,), text) -> velocity."""
    return lambda latents, sigmas, text: denoiser(latents, sigmas, text.context, used_rows=text.used_rows)
