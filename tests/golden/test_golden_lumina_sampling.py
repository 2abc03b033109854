"""Pictures of Lumina from noise to latents: the recorded runs, and diffusers' pipeline.

The recorded runs are drawn along the table that SD3 is drawn along, shifted by 6; diffusers takes even steps, and so do we.
"""

from __future__ import annotations

import pytest
import torch
from flow_trajectory import Watched, recorded_velocity
from test_golden_lumina_dit import golden_denoiser

from golden_files import Golden, load_golden, relative_error
from library.lumina.denoiser import NextDit
from library.lumina.sampling import velocity_of
from library.lumina.text import LuminaConditioning
from library.sampling.flow_samplers import FlowSettings, flow_sigmas

SOLVER_TOLERANCE, PATH_TOLERANCE = 1e-5, 1e-4
SHIFT = 6.0


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("lumina/sampling_loop.safetensors")


@pytest.fixture(scope="module")
def denoiser() -> NextDit:
    return golden_denoiser(load_golden("lumina/dit_forward.safetensors"))


def text(golden: Golden, name: str) -> LuminaConditioning:
    lengths = golden.inputs[f"{name}_mask"].sum(1).tolist()
    return LuminaConditioning(golden.inputs[f"{name}_embeds"], lengths=tuple(lengths))


def settings_of(case: dict) -> FlowSettings:
    return FlowSettings(
        steps=case["steps"], shift=SHIFT, scale=case["guidance"], schedule="table", cfg_trunc_ratio=case["cfg_trunc_ratio"],
        renorm_cfg=case["renorm_cfg"],
    )  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
def test_solver_alone(golden, number):
    case = golden.about["cases"][number]
    tag, steps = case["tag"], case["steps"]
    expected = golden.outputs[f"{tag}/sigmas"]
    sigmas = flow_sigmas(steps, SHIFT, schedule="table")
    assert relative_error(sigmas, expected) < 1e-6
    path = [*golden.outputs[f"{tag}/latents_at_step"], golden.outputs[f"{tag}/final_latents"]]
    watched = Watched(recorded_velocity(path, expected), "prompt")
    final = watched.draw(golden.inputs[f"{tag}/initial_noise"], None, settings_of(case))
    assert relative_error(torch.stack([*watched.latents, final]), torch.stack(path)) < SOLVER_TOLERANCE


@pytest.mark.parametrize("number", [0, 1])
def test_pictures(golden, denoiser, number):
    case = golden.about["cases"][number]
    tag, positive = case["tag"], text(golden, "positive")
    watched = Watched(velocity_of(denoiser), positive)
    final = watched.draw(golden.inputs[f"{tag}/initial_noise"], text(golden, "negative"), settings_of(case))
    assert relative_error(torch.stack(watched.latents), golden.outputs[f"{tag}/latents_at_step"]) < PATH_TOLERANCE
    assert relative_error(final, golden.outputs[f"{tag}/final_latents"]) < PATH_TOLERANCE
    assert relative_error(1 - torch.stack(watched.sigmas), golden.outputs[f"{tag}/model_t"]) < 1e-5
    assert watched.others == len(case["steps_with_cfg"])


def test_both_ways_of_guidance_are_recorded(golden):
    found = {(case["cfg_trunc_ratio"], case["renorm_cfg"]) for case in golden.about["cases"]}
    assert found == {(0.25, 1.0), (1.0, 0.0)}
