"""SD3's noise levels, noisy latents and losses against the recorded numbers; every case of the file."""

from __future__ import annotations

import pytest
import torch

from golden_files import Golden, load_golden, relative_error
from library.options.flow import Sd3FlowOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.sampling.flow_samplers import flow_sigmas
from library.training.loss.losses import flow_loss_weights
from library.training.loss.objective import FlowObjective
from library.training.loss.timesteps import sample_sigmas, sigma_sampler

TOLERANCE = 1e-5
CASES = ("uniform", "logit_normal", "logit_normal_b", "mode", "mode_b", "cosmap", "sigma_sqrt", "shift3", "shift_low", "range")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("sd3/train_math.safetensors")


def objective(golden: Golden, case: str) -> FlowObjective:
    return FlowObjective(Sd3FlowOptions(**golden.about["cases"][case]["options"]), NoiseOptions(), LossOptions())


def test_every_case_is_compared(golden):
    assert set(golden.about["cases"]) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_noise_levels(golden, case):
    flow, kind = objective(golden, case).flow, golden.about["cases"][case]["draw"]
    assert sigma_sampler(flow).draw == {"rand": "uniform", "normal": "normal"}[kind]
    draws = golden.inputs[f"{case}/draw_{kind}"]
    if kind == "normal":
        draws = (draws - flow.logit_mean) / flow.logit_std  # recorded with mean and deviation
    sigmas = sample_sigmas(draws, flow, latent_hw=(6, 8))
    assert torch.equal((sigmas * 1000).round(), golden.outputs[f"{case}/timesteps"])
    assert relative_error(sigmas, golden.outputs[f"{case}/sigmas"]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_losses(golden, case):
    made, inputs = objective(golden, case), golden.inputs
    noisy = made.corrupt_with(inputs["latents"], inputs["noise"], golden.outputs[f"{case}/sigmas"])
    if f"{case}/noisy" in golden.outputs:
        assert relative_error(noisy.latents, golden.outputs[f"{case}/noisy"]) < TOLERANCE
    assert relative_error(noisy.loss_weights, golden.outputs[f"{case}/weighting"]) < TOLERANCE
    losses = made.loss(inputs["model_output"], noisy, sample_weights=torch.ones(6))
    assert relative_error(losses, golden.outputs[f"{case}/loss_per_sample"]) < TOLERANCE


@pytest.mark.parametrize("scheme", ["cosmap", "sigma_sqrt"])
def test_weights_of_all_timesteps(golden, scheme):
    weights = flow_loss_weights(scheme, torch.arange(1, 1000) / 1000)
    expected = golden.outputs[f"weight_table_t1_999/{scheme}"]
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_noise_levels_of_samples(golden, steps):
    found = flow_sigmas(steps, 3.0, schedule="table")
    assert relative_error(found, golden.outputs[f"sampling_sigmas_shift3_steps{steps}"]) < 1e-6
