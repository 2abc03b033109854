"""What a LoRA file says of the model that it is for: Stable Diffusion 1, 2 or XL."""

from __future__ import annotations

from typing import Any

SGM = "https://github.com/Stability-AI/generative-models"  # whose names SDXL's LoRA files have


def describe(options: Any, *, sdxl: bool) -> dict[str, str]:
    """The ``ss_*`` and ``modelspec.*`` keys, whole, that only the architecture knows.

    ``options``: StableDiffusionTrainOptions, or SdxlTrainOptions with ``sdxl``.
    """
    v2, velocity, clip_skip = options.clip.v2, options.ddpm.v_parameterization, options.clip.clip_skip
    keys = {
        "ss_base_model_version": "sdxl_base_v1-0" if sdxl else f"sd_v{2 if v2 else 1}{'_v' if velocity else ''}",
        "modelspec.architecture": f"{_architecture(v2=v2, velocity=velocity, sdxl=sdxl)}/lora",
        "modelspec.implementation": SGM if sdxl else "diffusers",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
    }
    return keys if clip_skip is None else {**keys, "modelspec.encoder_layer": str(clip_skip)}


def _architecture(*, v2: bool, velocity: bool, sdxl: bool) -> str:
    """As the model specification names it (https://github.com/Stability-AI/ModelSpec)."""
    if sdxl:
        return "stable-diffusion-xl-v1-base"
    if v2:
        return "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
    return "stable-diffusion-v1"
