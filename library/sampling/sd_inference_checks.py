"""What the inference scripts of Stable Diffusion and SDXL check before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from library.files.safetensors_file import SafetensorsHeader
from library.sampling.inference_checks import InferenceChecks, with_own_flags
from library.sampling.picture_plan import DIFFUSION_SETTINGS
from library.sd.architecture import SAMPLERS, StableDiffusionArchitecture
from library.sd.layout import EPSILON, VELOCITY, Marks, StableDiffusionLayouts
from library.sd.vae_layout import LATENT_CHANNELS

SIDE_STEP_PX = 8  # a latent
SDXL_SETTINGS = DIFFUSION_SETTINGS | {"prompt2"}
CLIP_OPTIONS: dict[str, Any] = {"v2": False, "clip_skip": None, "max_token_length": None}  # and where a script has no such flag
FLAG_NAMES = {"--pretrained_model_name_or_path": "--ckpt_path"}  # training's -> these scripts'


def checks_of(
    architecture: StableDiffusionArchitecture,
    lora_problem: Callable[[Any, SafetensorsHeader], str | None],
    *,
    settings: frozenset[str] = DIFFUSION_SETTINGS,
) -> InferenceChecks:
    return InferenceChecks(
        read_layouts=lambda options: read_layouts(options, architecture),
        lora_problem=lora_problem,
        latent_channels=lambda layouts: LATENT_CHANNELS,
        side_step=SIDE_STEP_PX,
        samplers=SAMPLERS,
        settings=settings,
    )


def read_layouts(options: Any, architecture: StableDiffusionArchitecture) -> StableDiffusionLayouts:
    """The checked model files. Raises CheckpointError or OptionError, with these scripts' names of the flags."""
    return with_own_flags(lambda: architecture.read_layouts(as_in_training(options), options.parts), FLAG_NAMES)


def as_in_training(options: Any) -> SimpleNamespace:
    """What an architecture asks of a training's options, of a script's own."""
    files = options.files
    named = {name: getattr(files, name, default) for name, default in CLIP_OPTIONS.items()}
    return SimpleNamespace(
        model=SimpleNamespace(pretrained_model_name_or_path=files.ckpt_path, vae=files.vae),
        clip=SimpleNamespace(**named),
        # without the flag it is the model that says what it predicts, see ``prediction_of``
        **({"ddpm": SimpleNamespace(v_parameterization=True)} if files.v_parameterization else {}),
    )


def prediction_of(marks: Marks, *, v_parameterization: bool) -> str:
    """What the U-Net predicts: EPSILON or VELOCITY. A mark that may have been copied from another file does not count."""
    if v_parameterization:
        return VELOCITY
    return marks.prediction or EPSILON if marks.is_certain else EPSILON
