from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from library.options.ddpm import DdpmTrainingOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.loss.ddpm import (
    DdpmObjective,
    NoiseLevels,
    ddpm_loss_weights,
    published_alpha_bars,
    signal_to_noise,
    timesteps_of,
)
from library.training.loss.objective import NoisyLatents, Objective

GROUPS = (DdpmTrainingOptions, NoiseOptions, LossOptions)
LATENTS = torch.randn(4, 4, 8, 12, generator=torch.Generator().manual_seed(1))
EVERYTHING = {"v_parameterization": True, "zero_terminal_snr": True, "min_snr_gamma": 5.0, "noise_offset": 0.1,
              "scale_v_pred_loss_like_noise_pred": True, "debiased_estimation_loss": True, "adaptive_noise_scale": 0.1,
              "noise_offset_random_strength": True, "multires_noise_iterations": 4, "ip_noise_gamma": 0.1,
              "ip_noise_gamma_random_strength": True, "min_timestep": 100, "max_timestep": 900}  # fmt: skip


def objective(**changes) -> DdpmObjective:
    groups = [group(**{f.name: changes[f.name] for f in fields(group) if f.name in changes}) for group in GROUPS]
    return DdpmObjective(*groups)


def drawn(made: Objective, *, positions=range(4), seed: int = 1, step: int = 7, **changes) -> NoisyLatents:
    latents = LATENTS[list(positions)] if len(positions) < 5 else torch.zeros(len(positions), 4, 1, 1)
    return made.corrupt(latents, seed=seed, step=step, positions=positions, **changes)


def tensors(noisy: NoisyLatents) -> list[torch.Tensor]:
    return [noisy.latents, noisy.sigmas, noisy.timesteps, noisy.target, noisy.loss_weights]


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("changes", [{}, EVERYTHING])
def test_four_processes_draw_what_one_does(changes):
    made = objective(**changes)
    whole = tensors(drawn(made))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):  # also: nothing depends on what was drawn before
        for position in order:
            part = tensors(drawn(made, positions=(position,)))
            assert all(torch.equal(a[position : position + 1], b) for a, b in zip(whole, part, strict=True))


def test_steps_and_seeds_differ():
    base = drawn(objective())
    for other in (drawn(objective(), seed=2), drawn(objective(), step=8)):
        assert not torch.equal(base.timesteps, other.timesteps)
        assert not torch.equal(base.target, other.target)


@pytest.mark.parametrize(("low", "high"), [(None, None), (200, 600), (990, None), (None, 3)])
def test_all_timesteps_of_the_range_are_drawn_alike(low, high):
    made = objective(min_timestep=low, max_timestep=high)
    timesteps = drawn(made, positions=range(2000)).timesteps
    expected = made.ddpm.drawn
    assert timesteps.dtype == torch.int64
    assert timesteps.min() >= expected.start and timesteps.max() < expected.stop
    assert timesteps.float().mean() == pytest.approx((expected.start + expected.stop - 1) / 2, abs=0.025 * len(expected))
    if len(expected) <= 10:
        counts = torch.bincount(timesteps - expected.start, minlength=len(expected))
        assert counts.min() > 0.7 * 2000 / len(expected)


@pytest.mark.parametrize(("low", "high", "always"), [(555, 555, 555), (700, 300, 300), (999, 999, 999), (999, None, 999)])
def test_a_range_of_one_timestep(low, high, always):
    assert drawn(objective(min_timestep=low, max_timestep=high)).timesteps.tolist() == [always] * 4


def test_the_ends_of_a_draw_stay_within_the_table():
    assert timesteps_of(torch.tensor([0.0, 1 - 2**-24, 1.0]), range(1000)).tolist() == [0, 999, 999]


# ---------------------------------------------------------------- input and target


@pytest.mark.parametrize("v_parameterization", [False, True])
def test_image_and_noise_come_back_from_input_and_target(v_parameterization):
    noise, timesteps = torch.randn_like(LATENTS), torch.tensor([0, 300, 700, 999])
    noisy = objective(v_parameterization=v_parameterization).corrupt_with(LATENTS, noise, timesteps)
    sigma = noisy.sigmas.reshape(-1, 1, 1, 1)
    signal = (1 - sigma**2).sqrt()
    if v_parameterization:
        assert torch.allclose(signal * noisy.latents - sigma * noisy.target, LATENTS, atol=1e-5)
        assert torch.allclose(sigma * noisy.latents + signal * noisy.target, noise, atol=1e-5)
    else:
        assert torch.equal(noisy.target, noise)
        assert torch.allclose(noisy.latents, signal * LATENTS + sigma * noise, atol=1e-5)
    assert torch.all(noisy.sigmas.diff() > 0) and 0 < noisy.sigmas[0] < 0.03 and 0.99 < noisy.sigmas[3] < 1


def test_the_last_level_of_zero_terminal_snr_is_noise_alone():
    made, noise = objective(zero_terminal_snr=True, v_parameterization=True), torch.randn_like(LATENTS)
    noisy = made.corrupt_with(LATENTS, noise, torch.tensor([0, 500, 998, 999]))
    assert torch.equal(noisy.latents[3], noise[3]) and noisy.sigmas[3] == 1
    assert torch.equal(noisy.target[3], -LATENTS[3])
    plain = objective(v_parameterization=True).corrupt_with(LATENTS, noise, noisy.timesteps)
    assert torch.allclose(noisy.latents[0], plain.latents[0], atol=1e-6)  # the first level stays as it is
    assert (noisy.sigmas[1:] > plain.sigmas[1:]).all()


def test_perturbed_input_keeps_the_target():
    for v_parameterization in (False, True):
        plain, perturbed = (
            drawn(objective(v_parameterization=v_parameterization, **changes)) for changes in ({}, {"ip_noise_gamma": 0.2})
        )
        assert torch.equal(plain.target, perturbed.target)
        assert not torch.equal(plain.latents, perturbed.latents)


def test_only_the_model_input_is_rounded():
    noisy, exact = (drawn(objective(**EVERYTHING), dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert noisy.latents.dtype == torch.bfloat16
    assert torch.equal(noisy.latents, exact.latents.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(tensors(noisy)[1:], tensors(exact)[1:], strict=True))
    assert all(tensor.dtype == torch.float32 for tensor in (noisy.sigmas, noisy.target, noisy.loss_weights))


# ---------------------------------------------------------------- weights and loss


def test_plain_losses_weigh_one():
    assert torch.equal(NoiseLevels.of(DdpmTrainingOptions()).loss_weights, torch.ones(1000))


def test_min_snr_lowers_the_weight_of_low_noise_only():
    weights = NoiseLevels.of(DdpmTrainingOptions(min_snr_gamma=5.0)).loss_weights
    is_low = signal_to_noise(published_alpha_bars()) > 5
    assert torch.equal(weights < 1, is_low)
    assert torch.equal(weights[~is_low], torch.ones_like(weights[~is_low]))


def test_weights_are_finite_with_zero_terminal_snr_and_those_without_it():
    changes = {"min_snr_gamma": 5.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.1}
    weights = NoiseLevels.of(DdpmTrainingOptions(zero_terminal_snr=True, **changes)).loss_weights
    assert torch.isfinite(weights).all() and (weights > 0).all()
    assert torch.equal(weights, NoiseLevels.of(DdpmTrainingOptions(**changes)).loss_weights)


def test_weights_multiply():
    snr, each = signal_to_noise(published_alpha_bars()), [{"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True},
                                                          {"scale_v_pred_loss_like_noise_pred": True}]  # fmt: skip
    alone = [ddpm_loss_weights(DdpmTrainingOptions(v_parameterization=True, **one), snr) for one in each]
    options = DdpmTrainingOptions(v_parameterization=True, **{name: value for one in each for name, value in one.items()})
    assert torch.allclose(ddpm_loss_weights(options, snr), alone[0] * alone[1] * alone[2], rtol=1e-6)


def test_zero_switches_a_weight_off():
    options = DdpmTrainingOptions(min_snr_gamma=0.0, v_pred_like_loss=0.0)
    assert torch.equal(NoiseLevels.of(options).loss_weights, torch.ones(1000))


def test_loss_weighs_levels_samples_and_positions():
    made = objective(min_snr_gamma=5.0)
    noisy = made.corrupt_with(LATENTS, torch.randn_like(LATENTS), torch.tensor([0, 100, 500, 999]))
    mask = torch.zeros(4, 1, 8, 12)
    mask[:, :, :2] = 1
    samples = torch.tensor([1.0, 0.0, 0.5, 2.0])
    losses = made.loss((noisy.target + 1).half(), noisy, sample_weights=samples, mask=mask)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, 0.25 * noisy.loss_weights * samples, rtol=1e-2)
    assert noisy.loss_weights[0] < noisy.loss_weights[1] < noisy.loss_weights[2] == 1


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_the_snr_schedule_is_finite_at_every_level(kind, zero_terminal):
    """Without signal, the noise over the signal is infinite; its threshold is c."""
    made = objective(loss_type=kind, zero_terminal_snr=zero_terminal)
    noisy = made.corrupt_with(LATENTS, torch.randn_like(LATENTS), torch.tensor([0, 1, 998, 999]))
    prediction = (noisy.target + 1e4).requires_grad_()
    losses = made.loss(prediction, noisy, sample_weights=torch.ones(4))
    losses.sum().backward()
    assert torch.isfinite(prediction.grad).all()
    slopes = losses.detach() / 1e4 / 2  # far from the target the losses are straight: 2c of huber, 2 of smooth_l1
    expected = torch.tensor([0.95, 0.93, 0.1, 0.1]) if kind == "huber" else torch.ones(4)
    assert torch.allclose(slopes, expected, atol=0.02)


def test_a_replaced_target_keeps_the_weights():
    """Differential output preservation: nothing else than the target is another."""
    made, prediction, target = objective(**EVERYTHING), torch.randn_like(LATENTS), torch.randn_like(LATENTS)
    noisy = drawn(made)
    replaced = made.loss(prediction, replace(noisy, target=target), sample_weights=torch.full((4,), 0.5))
    expected = (prediction - target).square().mean(dim=(1, 2, 3)) * noisy.loss_weights * 0.5
    assert torch.allclose(replaced, expected, rtol=1e-5)


# ---------------------------------------------------------------- validation and devices


def test_validation_looks_at_fixed_timesteps():
    assert objective().validation_timesteps() == (200, 400, 600, 800)
    assert objective(min_timestep=200, max_timestep=600).validation_timesteps() == (280, 360, 440, 520)
    assert objective(min_timestep=555, max_timestep=555).validation_timesteps() == (555,)
    assert objective(min_timestep=999).validation_timesteps() == (999,)
    made, noise = objective(v_parameterization=True), torch.randn_like(LATENTS)
    noisy = made.corrupt_at(LATENTS, noise, 700, dtype=torch.bfloat16)
    same = made.corrupt_with(LATENTS, noise, torch.full((4,), 700), dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(tensors(noisy), tensors(same), strict=True))


def test_settings_of_the_loss_are_not_those_of_the_range():
    base = objective().loss_settings()
    assert objective(min_timestep=5, noise_offset=0.1).loss_settings() == base
    for changes in ({"v_parameterization": True}, {"min_snr_gamma": 5.0}, {"loss_type": "l1"}, {"zero_terminal_snr": True}):
        assert objective(**changes).loss_settings() != base


def test_the_table_moves_once():
    """To the device of the batches, here one that has no values."""
    made = objective()
    on_meta = made.corrupt_at(LATENTS.to("meta"), LATENTS.to("meta"), 500)
    assert all(tensor.device.type == "meta" for tensor in tensors(on_meta))
    levels = made._levels
    made.loss(on_meta.target, on_meta, sample_weights=torch.ones(4, device="meta"))
    made.corrupt_at(LATENTS.to("meta"), LATENTS.to("meta"), 100)
    assert made._levels is levels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_never_waits_for_the_gpu():
    made, latents = objective(**EVERYTHING, loss_type="huber"), LATENTS.cuda()
    weights, mask = torch.ones(4, device="cuda"), torch.ones(4, 1, 8, 12, device="cuda")
    drawn_before = made.corrupt(latents, seed=1, step=0, positions=range(4))  # the table moves
    torch.cuda.set_sync_debug_mode("error")
    try:
        noisy = made.corrupt(latents, seed=1, step=1, positions=range(4), dtype=torch.bfloat16)
        made.loss(noisy.latents, noisy, sample_weights=weights, mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(drawn_before.timesteps, noisy.timesteps)
