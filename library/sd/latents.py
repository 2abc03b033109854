"""What makes the raw latents of an image coder those that a denoiser sees, and what cached ones depend on. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.dataset.caches.latent_cache import LatentRecipe
from library.files.weights_source import Part
from library.sd.fingerprint import part_fingerprint

if TYPE_CHECKING:
    from library.sd.vae_layout import VaeConfig


def scale_and_shift(part: Part[VaeConfig] | None, *, published: tuple[float, float]) -> tuple[float, float]:
    """latents = (z - shift) * scale: as the coder's own config says, else as ``published``."""
    scale, shift = published
    if part is None:
        return published
    return part.config.scale or scale, shift if part.config.shift is None else part.config.shift


def coder_recipe(arch: str, part: Part[VaeConfig], options: Any, *scaling: float) -> LatentRecipe:
    """Of latents of this coder under a run's options; ``scaling``: the numbers that they are scaled with."""
    dtype = "float32" if options.model.no_half_vae else options.run.weight_dtype
    fingerprint = "-".join([part_fingerprint(part), *map(str, scaling)])
    return LatentRecipe(arch=arch, vae_fingerprint=fingerprint, dtype=dtype, channels=part.config.latent_channels)
