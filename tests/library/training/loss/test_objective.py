from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from library.errors import OptionError
from library.options.flow import AnimaFlowOptions, FlowOptions, LuminaFlowOptions, Sd3FlowOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.loss.objective import FlowObjective, NoisyLatents

FLOWS = (AnimaFlowOptions, Sd3FlowOptions, LuminaFlowOptions)
LATENTS = torch.randn(4, 16, 8, 12, generator=torch.Generator().manual_seed(1))


def objective(flow: type[FlowOptions] = AnimaFlowOptions, **changes) -> FlowObjective:
    groups = [
        group(**{f.name: changes[f.name] for f in fields(group) if f.name in changes})
        for group in (flow, NoiseOptions, LossOptions)
    ]
    return FlowObjective(*groups)


EVERYTHING = {"timestep_sampling": "sigma", "weighting_scheme": "mode", "noise_offset": 0.1, "noise_offset_random_strength": True,
              "adaptive_noise_scale": 0.1, "multires_noise_iterations": 4, "ip_noise_gamma": 0.1,
              "ip_noise_gamma_random_strength": True}  # fmt: skip


def tensors(noisy: NoisyLatents) -> list[torch.Tensor]:
    return [noisy.latents, noisy.sigmas, noisy.timesteps, noisy.target, noisy.loss_weights]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"weighting_scheme": "sigma_sqrt"}])
def test_four_processes_draw_what_one_does(flow, changes):
    made = objective(flow, **changes)
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


@pytest.mark.parametrize("flow", FLOWS)
def test_corruption_is_a_straight_line(flow):
    noisy = objective(flow).corrupt(LATENTS, seed=1, step=0, positions=range(4))
    noise = noisy.target + LATENTS
    sigmas = noisy.sigmas.reshape(-1, 1, 1, 1)
    assert torch.allclose(noisy.latents, sigmas * noise + (1 - sigmas) * LATENTS, atol=1e-6)
    assert torch.allclose(noisy.timesteps, 1000 * noisy.sigmas)
    assert noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("flow", FLOWS)
def test_perturbed_input_keeps_the_target(flow):
    plain, perturbed = (
        objective(flow, **changes).corrupt(LATENTS, seed=1, step=0, positions=range(4))
        for changes in ({}, {"ip_noise_gamma": 0.2})
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


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_snr_schedule_is_refused(flow, kind):
    with pytest.raises(OptionError, match="--huber_schedule is snr.*constant or"):
        objective(flow, loss_type=kind)


def test_snr_schedule_does_not_matter_for_l2():
    assert objective(loss_type="l2").loss_options.huber_schedule == "snr"


@pytest.mark.parametrize("flow", FLOWS)
def test_validation_looks_at_fixed_timesteps(flow):
    made = objective(flow, min_timestep=500)
    assert objective(flow).validation_timesteps() == (200, 400, 600, 800)
    assert made.validation_timesteps() == (600, 700, 800, 900)
    noise = torch.randn_like(LATENTS)
    noisy = made.corrupt_at(LATENTS, noise, 700, dtype=torch.bfloat16)
    same = made.corrupt_with(LATENTS, noise, torch.full((4,), 0.7), dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(tensors(noisy), tensors(same), strict=True))


# ---------------------------------------------------------------- the loss of guessed images: SD3, and Lumina with sigma_scaled

IMAGE_FORMS = [(Sd3FlowOptions, {}), (LuminaFlowOptions, {"model_prediction_type": "sigma_scaled"})]
PREDICTION = torch.randn(4, 16, 8, 12, generator=torch.Generator().manual_seed(2))
ONES = torch.ones(4)


def losses_at(made: FlowObjective, sigmas: torch.Tensor, prediction: torch.Tensor = PREDICTION) -> torch.Tensor:
    return made.loss(prediction, made.corrupt_with(LATENTS, -LATENTS.flip(0), sigmas), sample_weights=ONES)


@pytest.mark.parametrize(("flow", "changes"), IMAGE_FORMS)
@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_guesses_of_the_image_are_compared_with_the_image(flow, changes, kind):
    sigmas = torch.tensor([0.05, 0.3, 0.7, 0.999])
    made = objective(flow, loss_type=kind, huber_schedule="exponential", **changes)
    noisy = made.corrupt_with(LATENTS, -LATENTS.flip(0), sigmas)
    plain = objective(loss_type=kind, huber_schedule="exponential")
    guess = noisy.latents - sigmas.view(-1, 1, 1, 1) * PREDICTION
    as_velocities = NoisyLatents(
        latents=noisy.latents, sigmas=sigmas, timesteps=noisy.timesteps, target=LATENTS, loss_weights=ONES
    )
    expected = plain.loss(guess, as_velocities, sample_weights=ONES)
    torch.testing.assert_close(losses_at(made, sigmas), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("flow", "changes"), IMAGE_FORMS)
def test_a_weight_of_one_over_sigma_squared_makes_it_the_loss_of_velocities_down_to_sigma_zero(flow, changes):
    sigmas, prediction = torch.tensor([0.0, 1e-4, 0.001, 0.8]), PREDICTION.clone().requires_grad_()
    found = losses_at(objective(flow, weighting_scheme="sigma_sqrt", **changes), sigmas, prediction)
    torch.testing.assert_close(found, losses_at(objective(), sigmas), rtol=1e-5, atol=0)
    found.sum().backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all() and prediction.grad[0].any()


@pytest.mark.parametrize(("flow", "changes"), IMAGE_FORMS)
def test_without_weights_low_noise_counts_less(flow, changes):
    sigmas = torch.tensor([0.0, 0.1, 0.5, 1.0])
    found = losses_at(objective(flow, weighting_scheme="none", **changes), sigmas)
    torch.testing.assert_close(found, sigmas**2 * losses_at(objective(), sigmas))


@pytest.mark.parametrize("kind", ["raw", "additive"])
@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_lumina_weighs_only_guesses_of_the_image(kind, scheme):
    sigmas = torch.tensor([0.01, 0.1, 0.5, 1.0])
    made = objective(LuminaFlowOptions, model_prediction_type=kind, weighting_scheme=scheme)
    assert torch.equal(losses_at(made, sigmas), losses_at(objective(), sigmas))


def test_settings_of_the_loss_tell_losses_apart():
    lumina = objective(LuminaFlowOptions).loss_settings()
    assert lumina == objective(LuminaFlowOptions, timestep_sampling="uniform", min_timestep=5, noise_offset=0.1).loss_settings()
    assert lumina == objective(LuminaFlowOptions, weighting_scheme="cosmap", model_prediction_type="additive").loss_settings()
    for changes in ({"loss_type": "l1"}, {"model_prediction_type": "sigma_scaled"}):
        assert lumina != objective(LuminaFlowOptions, **changes).loss_settings()
    assert objective(Sd3FlowOptions, weighting_scheme="cosmap").loss_settings() != objective(Sd3FlowOptions).loss_settings()
