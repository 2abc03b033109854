"""Noise, noise levels, loss weights and losses of Stable Diffusion against the recorded numbers; every case of the file."""

from __future__ import annotations

import functools
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_files import Golden, load_golden, relative_error
from library.options.ddpm import DdpmTrainingOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.loss.ddpm import (
    DdpmObjective,
    ddpm_loss_weights,
    published_alpha_bars,
    published_betas,
    signal_to_noise,
    zero_terminal_snr,
)
from library.training.loss.losses import huber_threshold
from library.training.loss.noise import layer_size_hw, offset_strength, perturbed_noise, with_coarse_layers
from library.training.loss.objective import NoisyLatents

TOLERANCE = 1e-5
GROUPS = (DdpmTrainingOptions, NoiseOptions, LossOptions)
NOISE_CASES = (
    *("plain", "offset", "offset_random", "offset_adaptive", "offset_adaptive_negative", "multires6", "multires_offset"),
    *("ip", "ip_random", "range", "fixed_t", "zero_terminal", "all"),
)
LOSS_CASES = (
    *("l2", "l1", "huber_snr", "huber_exp", "huber_const", "smooth_snr", "smooth_exp", "smooth_const", "minsnr_eps"),
    *("minsnr_v", "debiased_eps", "debiased_v", "scale_v", "v_like", "all_v", "mask_alpha", "mask_cond", "minsnr_eps_zt"),
)


@functools.cache
def golden() -> Golden:
    return load_golden("sd/train_math.safetensors")


def objective(values: dict) -> DdpmObjective:
    return DdpmObjective(*(group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in GROUPS))


def test_every_recorded_case_is_compared():
    about = golden().about
    assert set(about["noise_cases"]) == set(NOISE_CASES)
    assert set(about["loss_cases"]) == set(LOSS_CASES)


# ---------------------------------------------------------------- tables


def test_noise_levels():
    outputs, published = golden().outputs, published_alpha_bars()
    assert relative_error(published_betas(), outputs["schedule/betas"]) < TOLERANCE
    assert relative_error(published, outputs["schedule/alphas_cumprod"]) < TOLERANCE
    assert relative_error(signal_to_noise(published), outputs["schedule/all_snr"]) < TOLERANCE


def test_noise_levels_of_zero_terminal_snr():
    outputs, changed = golden().outputs, zero_terminal_snr(published_alpha_bars())
    assert changed[-1] == 0
    assert relative_error(changed, outputs["schedule_zero_terminal/alphas_cumprod"]) < TOLERANCE
    before = torch.cat([torch.ones(1), changed[:-1]])
    assert relative_error(1 - changed / before, outputs["schedule_zero_terminal/betas"]) < TOLERANCE


WEIGHTS = {
    "min_snr_1_eps": {"min_snr_gamma": 1.0},
    "min_snr_1_v": {"min_snr_gamma": 1.0, "v_parameterization": True},
    "min_snr_5_eps": {"min_snr_gamma": 5.0},
    "min_snr_5_v": {"min_snr_gamma": 5.0, "v_parameterization": True},
    "debiased_eps": {"debiased_estimation_loss": True},
    "debiased_v": {"debiased_estimation_loss": True, "v_parameterization": True},
    "scale_v_pred_like_noise": {"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True},
    "v_pred_like_0.01": {"v_pred_like_loss": 0.01},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_loss_weights_of_all_timesteps(name):
    weights = ddpm_loss_weights(DdpmTrainingOptions(**WEIGHTS[name]), signal_to_noise(published_alpha_bars()))
    expected = golden().outputs[f"weights/{name}"]
    assert relative_error(weights, expected) < TOLERANCE
    assert float((weights / expected - 1).abs().max()) < TOLERANCE  # of each timestep: small weights count as well


def test_every_recorded_weight_is_compared():
    recorded = {key.removeprefix("weights/") for key in golden().outputs if key.startswith("weights/")}
    assert recorded == WEIGHTS.keys()


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_huber_thresholds_of_all_timesteps(schedule, scale):
    options = LossOptions(loss_type="huber", huber_schedule=schedule, huber_scale=scale)
    found = huber_threshold(options, torch.arange(1000.0), published_alpha_bars())
    factor = 1.0 if schedule == "snr" else scale
    assert relative_error(found, golden().outputs[f"huber_c/{schedule}_c0.1_s1.0"] * factor) < TOLERANCE


def test_huber_thresholds_of_zero_terminal_snr():
    options = LossOptions(loss_type="huber", huber_schedule="snr")
    found = huber_threshold(options, torch.arange(1000.0), zero_terminal_snr(published_alpha_bars()).float())
    assert relative_error(found, golden().outputs["huber_c/snr_c0.1_s1.0_zeroterminal"]) < TOLERANCE


# ---------------------------------------------------------------- noise


class RecordedDraws:
    """What was drawn for a case, in its order."""

    def __init__(self, case: str):
        about = golden().about["noise_cases"][case]
        self._tensors = [golden().inputs[name.removeprefix("inputs/")] for name, _, _ in about["torch_draws_in_order"]]
        self._numbers = list(about["python_random_in_order"])

    def next(self) -> Tensor:
        return self._tensors.pop(0)

    def next_number(self) -> float:
        return self._numbers.pop(0)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return self.next().reshape(shape)  # one for the batch, where training draws one for each sample

    @property
    def are_used_up(self) -> bool:
        return not self._tensors and not self._numbers


def noise_of(made: DdpmObjective, latents: Tensor, draws: RecordedDraws) -> Tensor:
    """As ``training_noise`` does, from one draw for the whole batch."""
    options, noise = made.noise, draws.next()
    if options.noise_offset:
        strength = offset_strength(latents, options, draws)  # type: ignore[arg-type]
        noise = noise + strength * draws.next()
    layers: list[Tensor] = []
    for level in range(options.multires_noise_iterations or 0):
        layers.append(draws.next())
        assert tuple(layers[-1].shape[-2:]) == layer_size_hw(noise.shape[-2:], level, draws.next_number())
        if 1 in layers[-1].shape[-2:]:
            break
    return with_coarse_layers(noise, layers, options.multires_noise_discount) if layers else noise


def input_noise_of(made: DdpmObjective, noise: Tensor, draws: RecordedDraws) -> Tensor | None:
    options = made.noise
    if not options.ip_noise_gamma:
        return None
    strength = draws.next() if options.ip_noise_gamma_random_strength else 1.0
    return perturbed_noise(noise, draws.next(), options.ip_noise_gamma * strength)


@pytest.mark.parametrize("case", NOISE_CASES)
@pytest.mark.parametrize("v_parameterization", [False, True])
def test_noise_input_and_target(case, v_parameterization):
    data, draws = golden(), RecordedDraws(case)
    made = objective({**data.about["noise_cases"][case]["options"], "v_parameterization": v_parameterization})
    assert not [*made.ddpm.problems(), *made.noise.problems()]
    latents = data.inputs["latents"]
    expected = {name: data.outputs[f"noise/{case}/{name}"] for name in ("noise", "noisy_latents", "velocity_target")}
    noise = noise_of(made, latents, draws)
    assert relative_error(noise, expected["noise"]) < TOLERANCE
    timesteps = data.outputs[f"noise/{case}/timesteps"]
    assert all(int(timestep) in made.ddpm.drawn for timestep in timesteps)
    if len(made.ddpm.drawn) > 1:
        assert torch.equal(draws.next(), timesteps)
    noisy = made.corrupt_with(latents, noise, timesteps, input_noise=input_noise_of(made, noise, draws))
    assert relative_error(noisy.latents, expected["noisy_latents"]) < TOLERANCE
    assert relative_error(noisy.target, expected["velocity_target" if v_parameterization else "noise"]) < TOLERANCE
    assert draws.are_used_up


# ---------------------------------------------------------------- losses


def mask_of(kind: str | None, size_hw: torch.Size) -> Tensor | None:
    if kind is None:
        return None
    inputs = golden().inputs
    masks = inputs["loss/alpha_masks"] if kind == "alpha" else (inputs["loss/conditioning_images_R"] + 1) / 2
    return F.interpolate(masks.unsqueeze(1), size=size_hw, mode="area")  # (B, 1, h, w)


@pytest.mark.parametrize("case", LOSS_CASES)
def test_losses(case):
    data = golden()
    settings = data.about["loss_cases"][case]
    made, timesteps = objective(settings), data.inputs["loss/timesteps"]
    prediction, target = data.inputs["loss/pred"], data.inputs["loss/target"]
    noisy = made.corrupt_with(target, target, timesteps)
    noisy = NoisyLatents(latents=noisy.latents, sigmas=noisy.sigmas, timesteps=timesteps, target=target,
                         loss_weights=noisy.loss_weights)  # fmt: skip
    mask = mask_of(settings["mask"], prediction.shape[-2:])
    losses = made.loss(prediction, noisy, sample_weights=data.inputs["loss/loss_weights"], mask=mask)
    assert relative_error(losses, data.outputs[f"loss/{case}/per_sample"]) < TOLERANCE
    assert relative_error(losses.mean(), data.outputs[f"loss/{case}/mean"]) < TOLERANCE
    if mask is not None:
        plain = (prediction - target) ** 2 * mask
        assert relative_error(plain, data.outputs[f"loss/{case}/masked_elementwise"]) < TOLERANCE
