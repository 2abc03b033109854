"""Timesteps, noise and losses of the flow models with a choice of samplings against the recorded numbers; every case."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F

from golden_files import Golden, load_golden, relative_error
from library.options.flow import AnimaFlowOptions, LuminaFlowOptions, SampledFlowOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.loss.losses import elementwise_loss, flow_loss_weights, huber_threshold, per_sample_mean
from library.training.loss.noise import perturbed_noise
from library.training.loss.objective import FlowObjective, NoisyLatents
from library.training.loss.timesteps import DENSITIES, resolution_mu, sample_sigmas, sigma_sampler, table_sigmas, time_shift

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Model:
    """What the files of a model mean: ``sign`` of the recorded predictions and targets, as velocities noise - image."""

    options: type[SampledFlowOptions]
    cases: int
    samplings: frozenset[str]
    sign: int
    trainer_times: float  # the unit of the times that its trainer gives to the Huber losses, in timesteps


SAMPLINGS = frozenset({"uniform", "sigmoid", "shift", "flux_shift", "sigma"})
MODELS = {
    "anima": Model(AnimaFlowOptions, 38, SAMPLINGS, sign=1, trainer_times=1 / 1000),
    "lumina": Model(LuminaFlowOptions, 44, SAMPLINGS | {"nextdit_shift"}, sign=-1, trainer_times=1),
}


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@functools.cache
def golden(name: str) -> Golden:
    return load_golden(f"{name}/training_math.safetensors")


@functools.cache
def trace(name: str) -> Golden:
    return load_golden(f"{name}/mini_training_trace.safetensors")


def flow_options(name: str, args: dict) -> SampledFlowOptions:
    options = MODELS[name].options
    return options(**{field.name: args[field.name] for field in fields(options) if field.name in args})


def loss_options(**changes) -> LossOptions:
    return LossOptions(**{"huber_schedule": "constant", **changes})


def objective(name: str, args: dict) -> FlowObjective:
    return FlowObjective(flow_options(name, args), NoiseOptions(), loss_options())


def test_every_sampling_case(name):
    data, model, checked = golden(name), MODELS[name], set()
    for case in data.about["cases"]:
        tag, args, kind = case["tag"], flow_options(name, case["args"]), case["draws"][0]
        draws = data.inputs[f"{tag}/draw0_{kind}"]
        assert sigma_sampler(args).draw == ("uniform" if kind == "rand" else "normal"), tag
        sigmas = sample_sigmas(draws, args, latent_hw=tuple(case["size"]))
        assert relative_error(sigmas, data.outputs[f"{tag}/sigmas"]) < TOLERANCE, tag
        model_t = sigmas if model.sign > 0 else 1 - sigmas
        assert relative_error(model_t, data.outputs[f"{tag}/model_t"]) < TOLERANCE, tag
        assert relative_error(sigmas * 1000, data.outputs[f"{tag}/timesteps"]) < TOLERANCE, tag
        weights = flow_loss_weights(args.weighting_scheme, sigmas)
        assert relative_error(weights, data.outputs[f"{tag}/loss_weighting"]) < TOLERANCE, tag
        checked.add((args.timestep_sampling, args.weighting_scheme))
    assert len(data.about["cases"]) == model.cases
    assert {sampling for sampling, _ in checked} == model.samplings
    assert {scheme for sampling, scheme in checked if sampling == "sigma"} == DENSITIES.keys() - {"uniform"}


def test_every_noisy_input(name):
    data, checked = golden(name), 0
    for case in data.about["cases"]:
        tag, args = case["tag"], case["args"]
        expected = data.outputs.get(f"{tag}/noisy_model_input")
        if expected is None:
            continue
        size = "x".join(map(str, case["size"]))
        latents, noise = data.inputs[f"latents_{size}"], data.inputs[f"noise_{size}"]
        noisy = objective(name, args).corrupt_with(
            latents, noise, data.outputs[f"{tag}/sigmas"], input_noise=input_noise(data, case, noise)
        )
        assert relative_error(noisy.latents, expected) < TOLERANCE, tag
        assert torch.equal(noisy.target, noise - latents), tag
        checked += 1
    assert checked >= 6


def input_noise(data: Golden, case: dict, noise: torch.Tensor) -> torch.Tensor | None:
    """The perturbed noise of the ip_noise_gamma cases, from their raw draws."""
    gamma = case["args"].get("ip_noise_gamma")
    if not gamma:
        return None
    if case["args"]["ip_noise_gamma_random_strength"]:
        gamma = gamma * data.inputs[f"{case['tag']}/draw2_rand"]
    return perturbed_noise(noise, data.inputs[f"{case['tag']}/draw1_randn_like"], gamma)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_table_of_timesteps(name, shift):
    outputs = golden(name).outputs
    sigmas = table_sigmas((torch.arange(1000) + 0.5) / 1000, shift)
    assert relative_error(sigmas, outputs[f"scheduler/shift{shift}/sigmas"]) < TOLERANCE
    assert relative_error(sigmas * 1000, outputs[f"scheduler/shift{shift}/timesteps"]) < TOLERANCE


def test_resolution_shift(name):
    data = golden(name)
    for size_hw, mu in zip(data.inputs["fixed/latent_hw"].tolist(), data.outputs["fixed/mu"].tolist(), strict=True):
        assert resolution_mu(tuple(size_hw)) == pytest.approx(mu, rel=1e-9)
        expected = data.outputs.get(f"fixed/time_shift/{size_hw[0]}x{size_hw[1]}")
        if expected is not None:
            assert relative_error(time_shift(data.inputs["fixed/t"], mu), expected) < TOLERANCE


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "logit_normal", "mode", "none"])
def test_loss_weighting(name, scheme):
    data = golden(name)
    assert (
        relative_error(flow_loss_weights(scheme, data.inputs["fixed/sigmas"]), data.outputs[f"fixed/weighting/{scheme}"])
        < TOLERANCE
    )


LOSS_CASES = {
    "l1": loss_options(loss_type="l1"),
    "l2": loss_options(loss_type="l2"),
    **{f"{kind}/constant": loss_options(loss_type=kind) for kind in ("huber", "smooth_l1")},
    **{
        f"{kind}/exponential/{times}": loss_options(loss_type=kind, huber_schedule="exponential")
        for kind in ("huber", "smooth_l1")
        for times in ("timesteps_0_1000", "timesteps_as_trainer")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", LOSS_CASES)
def test_losses(name, case):
    """``timesteps_as_trainer`` records what the same formula gives for times as the reference's trainer has them; ours are
    0..1000."""
    data, options = golden(name), LOSS_CASES[case]
    scale = MODELS[name].trainer_times if case.endswith("as_trainer") else 1
    timesteps = data.inputs["loss/timesteps_0_1000"] * scale
    elements = elementwise_loss(data.inputs["loss/pred"], data.inputs["loss/target"], options, timesteps=timesteps)
    expected = f"loss/{case}"
    assert relative_error(elements, data.outputs[f"{expected}/per_element"]) < TOLERANCE
    assert relative_error(per_sample_mean(elements), data.outputs[f"{expected}/per_sample"]) < TOLERANCE
    total = (per_sample_mean(elements) * data.inputs["loss/loss_weights"]).mean()
    assert relative_error(total, data.outputs[f"{expected}/total_with_loss_weights"]) < TOLERANCE
    if f"{expected}/threshold" in data.outputs:
        assert relative_error(huber_threshold(options, timesteps), data.outputs[f"{expected}/threshold"]) < TOLERANCE


def test_every_recorded_loss_is_compared(name):
    keys = golden(name).outputs
    recorded = {key.removeprefix("loss/").removesuffix("/per_element") for key in keys if key.endswith("/per_element")}
    assert recorded == {*LOSS_CASES, "l2_weighted_masked"}


def test_weighted_and_masked_loss(name):
    data = golden(name)
    prediction, target = data.inputs["loss/pred"], data.inputs["loss/target"]
    masks = data.inputs["loss/alpha_masks"].unsqueeze(1)  # (B, 1, H, W)
    masks = F.interpolate(masks, size=prediction.shape[-2:], mode="area")
    noisy = NoisyLatents(
        latents=prediction, sigmas=torch.zeros(4), timesteps=torch.zeros(4), target=target,
        loss_weights=data.inputs["loss/extra_weighting"],
    )  # fmt: skip
    losses = objective(name, {"weighting_scheme": "none"}).loss(
        prediction, noisy, sample_weights=data.inputs["loss/loss_weights"], mask=masks
    )
    assert relative_error(losses.mean(), data.outputs["loss/l2_weighted_masked/total"]) < TOLERANCE


@pytest.mark.parametrize("step", range(5))
def test_training_trace_losses(name, step):
    """From the recorded predictions: the times, the target and the loss of each step."""
    data, model = trace(name), MODELS[name]
    setup = data.about["setup"]
    inputs = {key: data.inputs[f"step{step}/{key}"] for key in ("latents", "noise", "timestep_draw")}
    made = objective(
        name, {key: setup[key] for key in ("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "weighting_scheme")}
    )
    sigmas = sample_sigmas(inputs["timestep_draw"], made.flow, latent_hw=tuple(inputs["latents"].shape[-2:]))
    times = sigmas * 1000 * model.trainer_times
    assert relative_error(times, data.outputs[f"step{step}/timesteps_returned"]) < TOLERANCE
    noisy = made.corrupt_with(inputs["latents"], inputs["noise"], sigmas)
    velocity = model.sign * data.outputs[f"step{step}/model_pred"]
    losses = made.loss(velocity, noisy, sample_weights=torch.tensor(setup["loss_weights"]))
    assert relative_error(losses.mean(), data.outputs["loss"][step]) < TOLERANCE
