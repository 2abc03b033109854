"""Pictures of SD3 from noise to latents: the recorded runs, and the scheduler that the published pipeline has."""

from __future__ import annotations

import pytest
import torch
from flow_trajectory import Watched, recorded_velocity
from test_golden_sd3_mmdit import golden_denoiser

from golden_files import Golden, load_golden, relative_error
from library.sampling.flow_samplers import FlowSettings, flow_sigmas
from library.sampling.picture_plan import sample_defaults
from library.sd3.denoiser import Mmdit
from library.sd3.sampling import SCHEDULE, TextInputs, velocity_of

SOLVER_TOLERANCE, PATH_TOLERANCE = 1e-5, 1e-4  # of the files' README
RUNS = ("steps4_cfg5.0", "steps10_cfg3.5", "steps3_cfg1.0")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("sd3/sd3_sampling.safetensors")


@pytest.fixture(scope="module")
def denoiser(golden) -> Mmdit:
    return golden_denoiser(golden)


def settings_of(run: dict) -> FlowSettings:
    shift = sample_defaults("sd3").shift
    assert shift is not None
    return FlowSettings(steps=run["steps"], shift=shift, scale=run["cfg_scale"], schedule=SCHEDULE)


def texts(golden: Golden) -> tuple[TextInputs, TextInputs]:
    inputs = golden.inputs
    return TextInputs(inputs["cond"], inputs["pooled"]), TextInputs(inputs["uncond"], inputs["uncond_pooled"])


def path_of(golden: Golden, name: str) -> list[torch.Tensor]:
    steps = golden.about["runs"][name]["steps"]
    return [*(golden.outputs[f"{name}/x_before_{step:02d}"] for step in range(steps)), golden.outputs[f"{name}/final"]]


def test_every_run_is_compared(golden):
    assert set(golden.about["runs"]) == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_solver_alone(golden, name):
    run, path = golden.about["runs"][name], path_of(golden, name)
    sigmas = flow_sigmas(run["steps"], 3.0, schedule=SCHEDULE)
    assert relative_error(sigmas, torch.tensor(run["sigmas"])) < 1e-6
    watched = Watched(recorded_velocity(path, torch.tensor(run["sigmas"])), "prompt")
    final = watched.draw(golden.inputs["noise"], None, settings_of(run))
    for found, expected in zip([*watched.latents, final], path, strict=True):
        assert relative_error(found, expected) < SOLVER_TOLERANCE
    assert torch.stack(watched.sigmas).tolist() == pytest.approx(run["sigmas"][:-1], rel=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_pictures(golden, denoiser, name):
    run, path = golden.about["runs"][name], path_of(golden, name)
    positive, negative = texts(golden)
    watched = Watched(velocity_of(denoiser), positive)
    final = watched.draw(golden.inputs["noise"], negative if run["cfg_scale"] != 1 else None, settings_of(run))
    for found, expected in zip([*watched.latents, final], path, strict=True):
        assert relative_error(found, expected) < PATH_TOLERANCE
    assert watched.others == (run["steps"] if run["cfg_scale"] != 1 else 0)


def test_two_pictures_of_a_text_are_drawn_as_each_alone(golden, denoiser):
    run, (positive, negative) = golden.about["runs"]["steps4_cfg5.0"], texts(golden)
    noises = torch.cat([golden.inputs["noise"], golden.inputs["noise"].flip(1)])
    both = Watched(velocity_of(denoiser), positive.repeated(2)).draw(noises, negative.repeated(2), settings_of(run))
    alone = Watched(velocity_of(denoiser), positive).draw(noises[1:], negative, settings_of(run))
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_scheduler_of_the_published_pipeline_draws_the_same(golden, denoiser):
    """StableDiffusion3Pipeline's loop: guidance on the velocity, time as the scheduler gives it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(7)
    (positive, negative), latents = texts(golden), golden.inputs["noise"]
    for timestep in scheduler.timesteps:
        pair = [denoiser(latents, timestep.expand(1), text.context, text.pooled) for text in (negative, positive)]
        velocity = pair[0] + 4.0 * (pair[1] - pair[0])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    settings = FlowSettings(steps=7, shift=3.0, scale=4.0, schedule=SCHEDULE)
    found = Watched(velocity_of(denoiser), positive).draw(golden.inputs["noise"], negative, settings)
    assert relative_error(found, latents) < 1e-5
