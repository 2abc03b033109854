from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from library.errors import OptionError
from library.options.flow import AnimaFlowOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.loss.objective import FlowObjective, NoisyLatents

GROUPS = (AnimaFlowOptions, NoiseOptions, LossOptions)
LATENTS = torch.randn(4, 16, 8, 12, generator=torch.Generator().manual_seed(1))


def objective(**changes) -> FlowObjective:
    groups = [group(**{f.name: changes[f.name] for f in fields(group) if f.name in changes}) for group in GROUPS]
    return FlowObjective(*groups)


EVERYTHING = {"timestep_sampling": "sigma", "weighting_scheme": "mode", "noise_offset": 0.1, "noise_offset_random_strength": True,
              "adaptive_noise_scale": 0.1, "multires_noise_iterations": 4, "ip_noise_gamma": 0.1,
              "ip_noise_gamma_random_strength": True}  # fmt: skip


def tensors(noisy: NoisyLatents) -> list[torch.Tensor]:
    return [noisy.latents, noisy.sigmas, noisy.timesteps, noisy.target, noisy.loss_weights]


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"weighting_scheme": "sigma_sqrt"}])
def test_four_processes_draw_what_one_does(changes):
    made = objective(**changes)
    whole = tensors(made.corrupt(LATENTS, seed=1, step=7, positions=range(4)))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):  # also: nothing depends on what was drawn before
        for position in order:
            part = tensors(made.corrupt(LATENTS[position : position + 1], seed=1, step=7, positions=(position,)))
            assert all(torch.equal(a[position : position + 1], b) for a, b in zip(whole, part, strict=True))


def test_steps_and_seeds_differ():
    made = objective()
    base = made.corrupt(LATENTS, seed=1, step=7, positions=range(4))
    for seed, step in ((2, 7), (1, 8)):
        other = made.corrupt(LATENTS, seed=seed, step=step, positions=range(4))
        assert not torch.equal(base.sigmas, other.sigmas)
        assert not torch.equal(base.target, other.target)


def test_corruption_is_a_straight_line():
    noisy = objective().corrupt(LATENTS, seed=1, step=0, positions=range(4))
    noise = noisy.target + LATENTS
    sigmas = noisy.sigmas.reshape(-1, 1, 1, 1)
    assert torch.allclose(noisy.latents, sigmas * noise + (1 - sigmas) * LATENTS, atol=1e-6)
    assert torch.allclose(noisy.timesteps, 1000 * noisy.sigmas)
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_perturbed_input_keeps_the_target():
    plain, perturbed = (
        objective(**changes).corrupt(LATENTS, seed=1, step=0, positions=range(4)) for changes in ({}, {"ip_noise_gamma": 0.2})
    )
    assert torch.equal(plain.target, perturbed.target)
    assert not torch.equal(plain.latents, perturbed.latents)


def test_only_the_model_input_is_rounded():
    latents = LATENTS.bfloat16()
    noisy = objective().corrupt(latents, seed=1, step=0, positions=range(4), dtype=torch.bfloat16)
    exact = objective().corrupt(latents.float(), seed=1, step=0, positions=range(4))
    assert noisy.latents.dtype == torch.bfloat16
    assert torch.equal(noisy.latents, exact.latents.bfloat16())
    assert torch.equal(noisy.target, exact.target)


def test_given_noise_and_sigmas():
    noise, sigmas = torch.randn_like(LATENTS), torch.tensor([0.0, 0.25, 0.5, 1.0])
    noisy = objective().corrupt_with(LATENTS, noise, sigmas)
    assert torch.equal(noisy.latents[0], LATENTS[0])
    assert torch.equal(noisy.latents[3], noise[3])


def test_loss_weighs_samples():
    made = objective(weighting_scheme="cosmap")
    noisy = made.corrupt(LATENTS, seed=1, step=0, positions=range(4))
    losses = made.loss((noisy.target + 1).half(), noisy, sample_weights=torch.tensor([1.0, 0.0, 0.5, 2.0]))
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, noisy.loss_weights * torch.tensor([1.0, 0.0, 0.5, 2.0]), rtol=1e-2)


def test_loss_mask():
    made = objective()
    noisy = made.corrupt(LATENTS, seed=1, step=0, positions=range(4))
    mask = torch.zeros(4, 1, 8, 12)
    mask[:, :, :4] = 1
    losses = made.loss(noisy.target + 1, noisy, sample_weights=torch.ones(4), mask=mask)
    assert torch.allclose(losses, torch.full((4,), 0.5), rtol=1e-4)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_snr_schedule_is_refused(kind):
    with pytest.raises(OptionError, match="--huber_schedule is snr.*constant or"):
        objective(loss_type=kind)


def test_snr_schedule_does_not_matter_for_l2():
    assert objective(loss_type="l2").loss_options.huber_schedule == "snr"


def test_validation_looks_at_fixed_timesteps():
    made = objective(min_timestep=500)
    assert objective().validation_timesteps() == (200, 400, 600, 800)
    assert made.validation_timesteps() == (600, 700, 800, 900)
    noise = torch.randn_like(LATENTS)
    noisy = made.corrupt_at(LATENTS, noise, 700, dtype=torch.bfloat16)
    same = made.corrupt_with(LATENTS, noise, torch.full((4,), 0.7), dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(tensors(noisy), tensors(same), strict=True))
