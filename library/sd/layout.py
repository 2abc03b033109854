"""What a Stable Diffusion checkpoint holds, as far as its names, shapes and marks tell. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.files.weights_source import Part

if TYPE_CHECKING:
    from library.sd.clip_layout import ClipConfig
    from library.sd.unet_layout import UNetConfig
    from library.sd.vae_layout import VaeConfig

EPSILON, VELOCITY = "epsilon", "v"  # what a U-Net may predict
SD_SCALE, SDXL_SCALE = 0.18215, 0.13025  # what makes latents vary by about 1; SD 1.x and 2.x, and SDXL, as published


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What a checkpoint says about its training, where it says anything; ``where`` names the key or file that does."""

    prediction: str | None = None  # EPSILON or VELOCITY
    zero_terminal_snr: bool | None = None
    where: str = ""
    is_certain: bool = True  # a metadata entry may have been copied from another file


@dataclass(frozen=True, slots=True, kw_only=True)
class StableDiffusionLayouts:
    """The checked models of a run; None, or no encoder, for those that were not asked for."""

    denoiser: Part[UNetConfig] | None = None
    text: tuple[Part[ClipConfig], ...] = ()  # one for SD 1 and 2; CLIP-L and CLIP-G for SDXL
    vae: Part[VaeConfig] | None = None
    marks: Marks = Marks()
