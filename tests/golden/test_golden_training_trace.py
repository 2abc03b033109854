"""Five recorded optimizer steps of LoRA training on flow models, with the parts that a run is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import test_golden_lumina_dit
import test_golden_sd3_mmdit
import torch
from recorded_training import compare_changes, compare_elements, optimizer_steps, start_of
from torch import Tensor, nn

from golden_files import Golden, load_golden, relative_error
from library.anima.checkpoint import build_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import config_from_shapes
from library.lumina.sampling import velocity_of as lumina_velocity
from library.lumina.text import LuminaConditioning
from library.nn.loading import load_into
from library.options.flow import AnimaFlowOptions, FlowOptions, LuminaFlowOptions, Sd3FlowOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.sd3.sampling import TextInputs
from library.sd3.sampling import velocity_of as sd3_velocity
from library.training.loss.objective import FlowObjective, NoisyLatents
from library.training.loss.timesteps import sample_sigmas
from networks import lora, lora_anima, lora_lumina, lora_sd3

Inputs = dict[str, Tensor]
Predict = Callable[[nn.Module, NoisyLatents, Inputs], Tensor]


def anima_denoiser(trace: Golden) -> AnimaDenoiser:
    golden = load_golden("anima/dit_forward.safetensors")
    weights = {name.removeprefix("net."): tensor for name, tensor in golden.weights.items()}
    denoiser = build_denoiser(config_from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, {}, {}))
    load_into(denoiser, weights.items(), device="cpu", dtype=torch.float32)
    return denoiser


def lumina_denoiser(trace: Golden) -> nn.Module:
    return test_golden_lumina_dit.golden_denoiser(load_golden("lumina/dit_forward.safetensors"))


def sd3_denoiser(trace: Golden) -> nn.Module:
    model = {name: tensor for name, tensor in trace.weights.items() if not name.startswith("lora")}
    return test_golden_sd3_mmdit.golden_denoiser(Golden(model, {}, {}, {}))


def anima_prediction(denoiser: nn.Module, noisy: NoisyLatents, inputs: Inputs) -> Tensor:
    text = (inputs["qwen_embeds"], inputs["qwen_mask"], inputs["t5_ids"], inputs["t5_mask"])
    context = denoiser.encode_context(*text, rows=inputs["t5_ids"].shape[1])
    return denoiser(noisy.latents, noisy.sigmas, context)


def lumina_prediction(denoiser: nn.Module, noisy: NoisyLatents, inputs: Inputs) -> Tensor:
    text = LuminaConditioning(inputs["cap_feats"], lengths=tuple(inputs["cap_mask"].sum(1).tolist()))
    return lumina_velocity(denoiser)(noisy.latents, noisy.sigmas, text)


def sd3_prediction(denoiser: nn.Module, noisy: NoisyLatents, inputs: Inputs) -> Tensor:
    clip = inputs["lg_out"]
    clip = nn.functional.pad(clip, (0, inputs["t5_out"].shape[-1] - clip.shape[-1]))
    text = TextInputs(torch.cat([clip, inputs["t5_out"]], dim=1), inputs["lg_pooled"])
    return sd3_velocity(denoiser)(noisy.latents, noisy.sigmas, text)


@dataclass(frozen=True)
class Model:
    """How a recorded run is made again. ``sign``: of the recorded predictions, as velocities noise - image."""

    file: str
    flow: type[FlowOptions]
    denoiser: Callable[[Golden], nn.Module]
    predict: Predict
    sign: int = 1


MODELS = {
    "anima": Model("anima/mini_training_trace", AnimaFlowOptions, anima_denoiser, anima_prediction),
    "lumina": Model("lumina/mini_training_trace", LuminaFlowOptions, lumina_denoiser, lumina_prediction, sign=-1),
    "sd3": Model("sd3/sd3_train_trace", Sd3FlowOptions, sd3_denoiser, sd3_prediction),
}
RUNS = [("anima", lora_anima), ("lumina", lora_lumina), ("sd3", lora_sd3), ("sd3", lora)]
TIMES = ("timestep_sampling", "weighting_scheme", "discrete_flow_shift", "sigmoid_scale", "training_shift")


class Trace:
    """A recorded run; its settings and outputs under one name, whichever of the two forms of file it is in."""

    def __init__(self, model: Model):
        self.model, self.golden = model, load_golden(f"{model.file}.safetensors")
        about, outputs = self.golden.about, self.golden.outputs
        self.is_setup = "setup" in about
        training = about["setup" if self.is_setup else "training"]
        self.dim, self.alpha = training["network_dim"], training["network_alpha"]
        self.times = {name: value for name, value in (training | training.get("options", {})).items() if name in TIMES}
        self.options = OptimizerOptions(learning_rate=1e-3, max_grad_norm=training["max_grad_norm"])
        self.losses = outputs["loss" if self.is_setup else "losses"]
        self.norms = outputs["grad_norm_before_clip" if self.is_setup else "grad_norms"]

    @cached_property
    def start(self) -> dict[str, Tensor]:
        weights = self.golden.weights
        return named(weights, "lora_init/") if self.is_setup else start_of(weights)

    def inputs(self, step: int) -> Inputs:
        return named(self.golden.inputs, f"step{step}/")

    def compare(self, network: nn.Module) -> None:
        if self.is_setup:
            compare_elements(network.state_dict(), named(self.golden.outputs, "lora_final/"))
        else:
            compare_changes(network, self.start, named(self.golden.outputs, "final/"))


def named(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


@pytest.mark.parametrize(("name", "network_module"), RUNS)
def test_five_steps(name, network_module):
    model = MODELS[name]
    trace = Trace(model)
    denoiser = model.denoiser(trace.golden).requires_grad_(False)
    network = network_module.create_network(1.0, trace.dim, trace.alpha, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    network.load_state_dict(trace.start)
    groups, names = network.prepare_optimizer_params(None, None, trace.options.learning_rate)
    for (told, group), expected in zip(
        zip(names, groups, strict=True), trace.golden.about.get("param_groups", [{}]), strict=True
    ):
        found = {"description": told, "count": len(group["params"]), "lr": group["lr"]}
        assert found | expected == found
    objective = FlowObjective(model.flow(**trace.times), NoiseOptions(), LossOptions())

    def loss_of(step: int) -> Tensor:
        inputs = trace.inputs(step)
        draws = next(inputs[key] for key in ("timestep_draw", "density_draw") if key in inputs)
        sigmas = sample_sigmas(draws, objective.flow, latent_hw=tuple(inputs["latents"].shape[-2:]))
        noisy = objective.corrupt_with(inputs["latents"], inputs["noise"], sigmas)
        prediction = model.predict(denoiser, noisy, inputs)
        recorded = trace.golden.outputs.get(f"step{step}/model_pred")
        assert recorded is None or relative_error(model.sign * prediction.detach(), recorded) < 1e-4
        weights = inputs.get("loss_weights", torch.ones(len(draws)))
        return objective.loss(prediction, noisy, sample_weights=weights).mean()

    for step in optimizer_steps(groups, trace.options, loss_of, losses=trace.losses, norms=trace.norms):
        if step == 0 and not trace.is_setup:
            compare_changes(network, trace.start, named(trace.golden.outputs, "after_step1/"))
    trace.compare(network)
