"""Five recorded optimizer steps of LoRA training, with the parts that a run is made of."""

from __future__ import annotations

import torch
from torch import nn

from golden_files import Golden, load_golden, relative_error
from library.anima.checkpoint import build_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import config_from_shapes
from library.nn.loading import load_into
from library.options.flow import AnimaFlowOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.schedule import ScheduleOptions
from library.training.loss.objective import FlowObjective
from library.training.loss.timesteps import sample_sigmas
from library.training.optimizing.gradients import Gradients
from library.training.optimizing.optimizers import create_optimizer
from library.training.optimizing.schedules import create_schedule
from networks.lora_anima import create_network


def frozen_denoiser() -> AnimaDenoiser:
    golden = load_golden("anima/dit_forward.safetensors")
    weights = {name.removeprefix("net."): tensor for name, tensor in golden.weights.items()}
    denoiser = build_denoiser(config_from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, {}, {}))
    load_into(denoiser, weights.items(), device="cpu", dtype=torch.float32)
    return denoiser.requires_grad_(False)


def lora(denoiser: AnimaDenoiser, trace: Golden) -> nn.Module:
    setup = trace.about["setup"]
    network = create_network(1.0, setup["network_dim"], setup["network_alpha"], None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    initial = {name.removeprefix("lora_init/"): tensor for name, tensor in trace.weights.items()}
    network.load_state_dict(initial)
    return network


def test_five_steps():
    trace = load_golden("anima/mini_training_trace.safetensors")
    setup = trace.about["setup"]
    denoiser = frozen_denoiser()
    network = lora(denoiser, trace)
    optimizer_options = OptimizerOptions(learning_rate=setup["learning_rate"], max_grad_norm=setup["max_grad_norm"])
    groups, names = network.prepare_optimizer_params(None, None, optimizer_options.learning_rate)
    assert [(name, len(group["params"]), group["lr"]) for name, group in zip(names, groups, strict=True)] == [
        (group["description"], group["count"], group["lr"]) for group in trace.about["param_groups"]
    ]
    optimizer = create_optimizer(groups, optimizer_options).optimizer
    schedule = create_schedule(optimizer, ScheduleOptions(), total_steps=5, optimizer=optimizer_options)
    gradients = Gradients([p for group in groups for p in group["params"]], max_norm=optimizer_options.max_grad_norm)
    objective = FlowObjective(
        AnimaFlowOptions(timestep_sampling=setup["timestep_sampling"], weighting_scheme="none"), NoiseOptions(), LossOptions()
    )
    for step in range(5):
        inputs = {name.split("/")[1]: tensor for name, tensor in trace.inputs.items() if name.startswith(f"step{step}/")}
        sigmas = sample_sigmas(inputs["timestep_draw"], objective.flow, latent_hw=tuple(inputs["latents"].shape[-2:]))
        noisy = objective.corrupt_with(inputs["latents"], inputs["noise"], sigmas)
        text = (inputs["qwen_embeds"], inputs["qwen_mask"], inputs["t5_ids"], inputs["t5_mask"])
        context = denoiser.encode_context(*text, rows=inputs["t5_ids"].shape[1])
        prediction = denoiser(noisy.latents, noisy.sigmas, context)
        assert relative_error(prediction.detach(), trace.outputs[f"step{step}/model_pred"]) < 1e-4
        loss = objective.loss(prediction, noisy, sample_weights=torch.tensor(setup["loss_weights"])).mean()
        assert relative_error(loss.detach(), trace.outputs["loss"][step]) < 1e-4
        loss.backward()
        gradients.reduce()
        assert relative_error(gradients.clip(), trace.outputs["grad_norm_before_clip"][step]) < 1e-3
        assert gradients.drop_if_not_finite(loss)
        optimizer.step()
        schedule.step()
        gradients.zero()
    compare_weights(network.state_dict(), trace)


def compare_weights(final: dict[str, torch.Tensor], trace: Golden) -> None:
    """At most 1 % of the elements off by more than 2e-5, none by more than 5e-3: Adam amplifies noise around zero."""
    expected = {name.removeprefix("lora_final/"): t for name, t in trace.outputs.items() if name.startswith("lora_final/")}
    assert final.keys() == expected.keys()
    off = torch.cat([(final[name] - tensor).abs().flatten() for name, tensor in expected.items()])
    assert (off > 2e-5).float().mean() <= 0.01
    assert off.max() <= 5e-3
