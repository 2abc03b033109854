"""Five recorded optimizer steps of LoRA training on Stable Diffusion 1, 2 and XL, with the parts that a run is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from recorded_training import STEPS, compare_changes, optimizer_steps, start_of
from safetensors.torch import save_file
from torch import Tensor, nn

from golden_files import Golden, load_golden
from library.files.open_weights import open_weights
from library.files.weights_source import WeightsSource
from library.options.ddpm import DdpmTrainingOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.sd.clip import ClipTextModel, build_clip, load_clip
from library.sd.clip_layout import clip_part
from library.sd.denoiser import build_unet, load_unet
from library.sd.unet_layout import unet_part
from library.sdxl.sizes import size_vector
from library.training.loss.ddpm import DdpmObjective
from library.training.loss.objective import NoisyLatents
from networks.lora import create_network

Predict = Callable[[NoisyLatents, dict[str, Tensor]], Tensor]

UNET, CLIP = "model.diffusion_model.", "cond_stage_model.transformer."
LEARNING_RATE, TEXT_LEARNING_RATE = 1e-3, 5e-4
CONFIGS = {  # what shapes cannot tell
    "sd/sd1_train_trace": {"unet": {"heads": [2, 2, 2, 2], "norm_groups": 4}},
    "sd/sd2_v_train_trace": {"unet": {"heads": [1, 2, 4, 4], "norm_groups": 4}},
    "sdxl/sdxl_train_trace": {"unet": {"head_dim": 6, "norm_groups": 3}},
    "sd/sd1_te_train_trace": {"unet": {"heads": [2, 2, 2, 2], "norm_groups": 4}, "text": [{"heads": 3}]},
}


@dataclass
class Trace:
    """A recorded run, and what it needs to run again."""

    golden: Golden
    source: WeightsSource

    @property
    def training(self) -> dict:
        return self.golden.about["training"]

    def step(self, number: int) -> dict[str, Tensor]:
        start = f"step{number}/"
        return {name.removeprefix(start): tensor for name, tensor in self.golden.inputs.items() if name.startswith(start)}

    def expected(self, part: str) -> dict[str, Tensor]:
        outputs = self.golden.outputs
        return {name.removeprefix(part): tensor for name, tensor in outputs.items() if name.startswith(part)}

    def unet(self) -> nn.Module:
        part = unet_part(self.source, prefix=UNET, layout="original")
        unet = build_unet(part.config)
        load_unet(unet, part, device="cpu", dtype=torch.float32)
        return unet

    def text_encoder(self) -> ClipTextModel:
        part = clip_part(self.source, prefix=CLIP, layout="hf")
        encoder = build_clip(part.config)
        load_clip(encoder, part, device="cpu", dtype=torch.float32)
        return encoder

    def network(self, encoders: list[nn.Module], unet: nn.Module) -> nn.Module:
        network = create_network(1.0, self.training["network_dim"], self.training["network_alpha"], None, encoders, unet)
        network.apply_to(encoders, unet, bool(encoders), True)
        start, own = start_of(self.golden.weights), network.state_dict()
        # projections of SD 2 are recorded as matrices; in files they are 1x1 convolutions, as those of SD 1
        network.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in start.items()})
        return network


def trace_of(name: str, folder: Path) -> Trace:
    """The recorded weights become a checkpoint file in the original layout."""
    golden = load_golden(f"{name}.safetensors")
    tensors = {key: tensor for key, tensor in golden.weights.items() if not key.startswith("lora")}
    path = folder / "model.safetensors"
    save_file(tensors, path, {"config": json.dumps(CONFIGS[name])})
    return Trace(golden, open_weights(path, flag="--pretrained_model_name_or_path"))


def prediction_of(unet: nn.Module, noisy: NoisyLatents, inputs: dict[str, Tensor]) -> Tensor:
    """From recorded states of the text."""
    if "context" in inputs:
        return unet.predict(noisy.latents, noisy.timesteps, inputs["context"])
    original, crop, target = (inputs[name].flip(-1) for name in ("original_size_hw", "crop_top_left", "target_size_hw"))
    vector = size_vector(inputs["pooled"], original, crop, target)
    context = torch.cat([inputs["hidden1"], inputs["hidden2"]], dim=-1)
    return unet.predict(noisy.latents, noisy.timesteps, context, vector)


def train(trace: Trace, network: nn.Module, groups: list[dict], predict: Predict) -> Iterator[int]:
    """Compares losses and gradients of each step; yields after each."""
    is_velocity = trace.training.get("options", {}).get("v_parameterization", False)
    objective = DdpmObjective(DdpmTrainingOptions(v_parameterization=is_velocity), NoiseOptions(), LossOptions())

    def loss_of(step: int) -> Tensor:
        inputs = trace.step(step)
        noisy = objective.corrupt_with(inputs["latents"], inputs["noise"], inputs["timesteps"])
        weights = inputs.get("loss_weights", torch.ones(len(inputs["latents"])))
        return objective.loss(predict(noisy, inputs), noisy, sample_weights=weights).mean()

    assert trace.training["steps"] == STEPS
    options = OptimizerOptions(learning_rate=LEARNING_RATE, max_grad_norm=1.0)
    outputs = trace.golden.outputs
    yield from optimizer_steps(groups, options, loss_of, losses=outputs["losses"], norms=outputs["grad_norms"])


@pytest.mark.parametrize("name", ["sd/sd1_train_trace", "sd/sd2_v_train_trace", "sdxl/sdxl_train_trace"])
def test_five_steps_of_the_unet(name, tmp_path):
    trace = trace_of(name, tmp_path)
    unet = trace.unet()
    network = trace.network([], unet)
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    groups, _ = network.prepare_optimizer_params(None, None, LEARNING_RATE)
    for step in train(trace, network, groups, lambda noisy, inputs: prediction_of(unet, noisy, inputs)):
        if step == 0:
            compare_changes(network, start, trace.expected("after_step1/"))
    compare_changes(network, start, trace.expected("final/"))


def test_five_steps_of_unet_and_text_encoder(tmp_path):
    trace = trace_of("sd/sd1_te_train_trace", tmp_path)
    unet, encoder = trace.unet(), trace.text_encoder()
    network = trace.network([encoder], unet)
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    groups, names = network.prepare_optimizer_params([TEXT_LEARNING_RATE], LEARNING_RATE)
    assert [(name.partition(" ")[0], group["lr"]) for name, group in zip(names, groups, strict=True)] == [
        (trace.training["group_descriptions"][0], TEXT_LEARNING_RATE), (trace.training["group_descriptions"][1], LEARNING_RATE)
    ]  # fmt: skip
    ids = trace.golden.inputs["ids"].long()  # (captions, 1, 77)

    def predict(noisy: NoisyLatents, inputs: dict[str, Tensor]) -> Tensor:
        rows = ids[inputs["caption_rows"], 0]  # (B, 77)
        states = encoder.normed(encoder.run(encoder.embed(rows), 0, encoder.config.layers))
        return unet.predict(noisy.latents, noisy.timesteps, states)

    assert list(train(trace, network, groups, predict)) == [0, 1, 2, 3, 4]
    compare_changes(network, start, trace.expected("final/"))
