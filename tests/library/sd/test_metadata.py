"""What LoRA files say of Stable Diffusion's models: the names that other programs know."""

import pytest

from library.options.declare import groups_of
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.sd.metadata import SGM, describe

VERSIONS = [
    # sdxl, v2, v_parameterization -> ss_base_model_version, architecture
    (False, False, False, "sd_v1", "stable-diffusion-v1/lora"),
    (False, False, True, "sd_v1_v", "stable-diffusion-v1/lora"),
    (False, True, False, "sd_v2", "stable-diffusion-v2-512/lora"),
    (False, True, True, "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    (True, False, False, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    (True, False, True, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
]


def options_of_run(sdxl: bool, *, v2: bool = False, velocity: bool = False, clip_skip: int | None = None):
    option_set = SdxlTrainOptions if sdxl else StableDiffusionTrainOptions
    groups = groups_of(option_set)
    clip, ddpm = groups["clip"](v2=v2, clip_skip=clip_skip), groups["ddpm"](v_parameterization=velocity)
    return option_set(clip=clip, ddpm=ddpm)


@pytest.mark.parametrize(("sdxl", "v2", "velocity", "version", "architecture"), VERSIONS)
def test_versions(sdxl, v2, velocity, version, architecture):
    assert describe(options_of_run(sdxl, v2=v2, velocity=velocity), sdxl=sdxl) == {
        "ss_base_model_version": version,
        "modelspec.architecture": architecture,
        "modelspec.implementation": SGM if sdxl else "diffusers",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
    }


@pytest.mark.parametrize("sdxl", [False, True])
def test_the_layer_of_the_encoder(sdxl):
    assert describe(options_of_run(sdxl, clip_skip=2), sdxl=sdxl)["modelspec.encoder_layer"] == "2"
