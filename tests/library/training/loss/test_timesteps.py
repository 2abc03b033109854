from __future__ import annotations

import pytest
import torch

from library.options.flow import AnimaFlowOptions, FlowOptions, LuminaFlowOptions, Sd3FlowOptions
from library.training.loss.timesteps import (
    DENSITIES,
    SAMPLINGS,
    sample_sigmas,
    shift_sigmas,
    sigma_sampler,
    table_sigmas,
    time_shift,
)

COUNT = 40_000


def flow(**changes) -> AnimaFlowOptions:
    return AnimaFlowOptions(**changes)


def sd3(**changes) -> Sd3FlowOptions:
    return Sd3FlowOptions(**changes)


def sigmas_of(options: FlowOptions, count: int = COUNT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    make = torch.randn if sigma_sampler(options).draw == "normal" else torch.rand
    return sample_sigmas(make(count, generator=generator), options, latent_hw=(64, 64))


@pytest.mark.parametrize("name", [*SAMPLINGS, *(f"sigma/{density}" for density in DENSITIES)])
def test_sigmas_are_in_range(name):
    sampling, _, scheme = name.partition("/")
    sigmas = sigmas_of(flow(timestep_sampling=sampling, weighting_scheme=scheme or "uniform", discrete_flow_shift=3.0))
    assert sigmas.dtype == torch.float32
    assert sigmas.min() >= 0
    assert sigmas.max() <= 1
    assert sigmas.std() > 0.05


def test_uniform_is_uniform():
    sigmas = sigmas_of(flow(timestep_sampling="uniform"))
    assert sigmas.mean() == pytest.approx(0.5, abs=0.01)
    assert sigmas.var() == pytest.approx(1 / 12, abs=0.002)


def test_sigmoid_scale_widens():
    narrow, wide = sigmas_of(flow(sigmoid_scale=0.5)), sigmas_of(flow(sigmoid_scale=2.0))
    assert narrow.mean() == pytest.approx(0.5, abs=0.01)
    assert narrow.std() < wide.std()


def test_shift_moves_towards_noise():
    assert sigmas_of(flow(timestep_sampling="shift", discrete_flow_shift=3.0)).median() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(sigmas_of(flow(timestep_sampling="shift")), sigmas_of(flow()))


def test_flux_shift_grows_with_the_image():
    draws, options = torch.zeros(1), flow(timestep_sampling="flux_shift")
    small, large = (sample_sigmas(draws, options, latent_hw=size) for size in ((32, 32), (128, 128)))
    assert small < large


def test_nextdit_shift_is_flux_shift_of_uniform_draws():
    draws, size = torch.tensor([0.2, 0.7]), (64, 96)
    by_nextdit = sample_sigmas(draws, LuminaFlowOptions(timestep_sampling="nextdit_shift"), latent_hw=size)
    by_flux = sample_sigmas(torch.logit(draws), LuminaFlowOptions(timestep_sampling="flux_shift"), latent_hw=size)
    torch.testing.assert_close(by_nextdit, by_flux)


def test_lumina_is_trained_with_a_shift_of_six():
    assert sigmas_of(LuminaFlowOptions()).median() == pytest.approx(6 * 0.5 / (1 + 5 * 0.5), abs=0.01)


def test_ends_are_exact():
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(time_shift(ends, 1.15), ends)
    assert torch.equal(shift_sigmas(ends, 6.0), ends)
    assert torch.equal(sample_sigmas(ends, LuminaFlowOptions(timestep_sampling="nextdit_shift"), latent_hw=(8, 8)), ends)
    infinite = sample_sigmas(torch.tensor([-torch.inf, torch.inf]), flow(timestep_sampling="flux_shift"), latent_hw=(8, 8))
    assert torch.equal(infinite, ends)


def test_table_stays_within_its_thousand_steps():
    assert table_sigmas(torch.tensor([-0.1, 0.0, 0.9999, 1.0, 1.2]), 1.0).tolist() == pytest.approx(
        [1.0, 1.0, 0.001, 0.001, 0.001]
    )


def test_logit_normal_mean_and_deviation():
    middle = sigmas_of(flow(timestep_sampling="sigma", weighting_scheme="logit_normal"))
    noisier = sigmas_of(flow(timestep_sampling="sigma", weighting_scheme="logit_normal", logit_mean=-1.0))  # 0 = most noise
    narrow = sigmas_of(flow(timestep_sampling="sigma", weighting_scheme="logit_normal", logit_std=0.3))
    assert middle.mean() == pytest.approx(0.5, abs=0.01)
    assert noisier.mean() > 0.6
    assert narrow.std() < middle.std()


def test_mode_scale_zero_is_uniform():
    flat = sigmas_of(flow(timestep_sampling="sigma", weighting_scheme="mode", mode_scale=0.0))
    heavy = sigmas_of(flow(timestep_sampling="sigma", weighting_scheme="mode", mode_scale=1.29))
    assert flat.var() == pytest.approx(1 / 12, abs=0.002)
    assert heavy.std() < flat.std()


@pytest.mark.parametrize(("low", "high"), [(200, 800), (None, 500), (300, None), (400, 400)])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "sigma"])
def test_timestep_bounds(sampling, low, high):
    options = flow(timestep_sampling=sampling, min_timestep=low, max_timestep=high)
    free = sigmas_of(flow(timestep_sampling=sampling), 500)
    bound = sigmas_of(options, 500)
    low, high = (low or 0) / 1000, (high or 1000) / 1000
    assert bound.min() >= low - 1e-6
    assert bound.max() <= high + 1e-6
    assert torch.allclose(bound, low + (high - low) * free)


def test_bounds_of_the_whole_range_change_nothing():
    assert torch.equal(sigmas_of(flow(min_timestep=0, max_timestep=1000), 100), sigmas_of(flow(), 100))


# ---------------------------------------------------------------- SD3


@pytest.mark.parametrize("scheme", DENSITIES)
@pytest.mark.parametrize(("low", "high"), [(None, None), (100, 400), (None, 1), (999, None)])
def test_timesteps_of_sd3_are_whole_numbers_in_their_range(scheme, low, high):
    options = sd3(weighting_scheme=scheme, min_timestep=low, max_timestep=high, training_shift=3.0, mode_scale=3.0)
    timesteps = sigmas_of(options) * 1000
    torch.testing.assert_close(timesteps, timesteps.round(), rtol=0, atol=1e-4)
    timesteps = timesteps.round()
    first, behind = low or 0, high or 1000
    assert timesteps.min() >= first and timesteps.max() <= behind - 1
    if (low, high) == (100, 400):
        assert timesteps.min() < 130 and timesteps.max() > 390


def test_sd3_reaches_both_ends():
    ends = sample_sigmas(torch.tensor([0.0, 1.0]), sd3(), latent_hw=(8, 8))
    assert ends.tolist() == [0.0, pytest.approx(0.999)]
    far = sample_sigmas(torch.tensor([-torch.inf, torch.inf]), sd3(weighting_scheme="logit_normal"), latent_hw=(8, 8))
    assert torch.equal(far, ends)


def test_a_number_of_sd3s_density_is_the_noise_level():
    """With the sigma sampling of the other models it is a place in a falling table."""
    noisier = sigmas_of(sd3(weighting_scheme="logit_normal", logit_mean=1.0))
    assert noisier.mean() > 0.65 and sigmas_of(sd3(training_shift=3.0)).median() == pytest.approx(0.75, abs=0.01)
