"""The DiT, its adapter and the preview sampler against the recorded numbers of golden/anima."""

from __future__ import annotations

import pytest
import torch

from golden_files import Golden, load_golden, relative_error
from library.anima.adapter import LlmAdapter
from library.anima.checkpoint import build_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import adapter_from_shapes, config_from_shapes, expected_shapes
from library.nn.initial_noise import initial_noise
from library.nn.loading import load_into
from library.sampling.flow_samplers import FlowSettings, draw_flow, flow_sigmas

TOLERANCE, GRADIENT_TOLERANCE = 3e-5, 3e-4


def golden_denoiser(golden: Golden) -> AnimaDenoiser:
    weights = {name.removeprefix("net."): tensor for name, tensor in golden.weights.items()}
    config = config_from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, {}, {})
    denoiser = build_denoiser(config)
    load_into(denoiser, weights.items(), device="cpu", dtype=torch.float32)
    return denoiser


@pytest.fixture(scope="module")
def forward() -> Golden:
    return load_golden("anima/dit_forward.safetensors")


def run_case(denoiser: AnimaDenoiser, inputs: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    context = inputs.get("context")
    if kind == "adapter":
        rows = inputs["t5_ids"].shape[1]
        context = denoiser.encode_context(
            inputs["qwen_embeds"], inputs["qwen_mask"], inputs["t5_ids"], inputs["t5_mask"], rows=rows
        )
    mask = inputs["padding_mask_pixels"] if kind == "context_padmask" else None
    return denoiser(inputs["x"].squeeze(2), inputs["timesteps"], context, mask)


@pytest.mark.parametrize("kind", ["context", "context_padmask", "adapter"])
@pytest.mark.parametrize("case", ["case0_8x8", "case1_12x6"])
def test_forward_and_gradients(forward, case, kind):
    denoiser = golden_denoiser(forward)
    inputs = {name.removeprefix(f"{case}/"): t for name, t in forward.inputs.items() if name.startswith(f"{case}/")}
    gradients = {n.split("/grad/net.")[1]: t for n, t in forward.outputs.items() if n.startswith(f"{case}/{kind}/grad/")}
    for name in gradients:
        denoiser.get_parameter(name).requires_grad_()

    velocity = run_case(denoiser, inputs, kind)
    loss = (velocity * inputs["loss_weight"].squeeze(2)).mean()
    loss.backward()

    assert relative_error(velocity.detach(), forward.outputs[f"{case}/{kind}"].squeeze(2)) < TOLERANCE
    assert relative_error(loss.detach(), forward.outputs[f"{case}/{kind}/loss"][0]) < TOLERANCE
    assert gradients
    for name, expected in gradients.items():
        assert relative_error(denoiser.get_parameter(name).grad, expected) < GRADIENT_TOLERANCE, name


def test_padding_mask_of_zeros_is_no_mask(forward):
    denoiser = golden_denoiser(forward)
    inputs = {name.split("/")[1]: t for name, t in forward.inputs.items() if name.startswith("case0_8x8/")}
    plain = (inputs["x"].squeeze(2), inputs["timesteps"], inputs["context"])
    with torch.no_grad():
        assert torch.equal(denoiser(*plain), denoiser(*plain, inputs["padding_mask"]))


@pytest.mark.parametrize("case", ["case0", "case1", "empty"])
def test_adapter(case):
    golden = load_golden("anima/llm_adapter.safetensors")
    weights = {name.removeprefix("net."): tensor for name, tensor in golden.weights.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    adapter = LlmAdapter(adapter_from_shapes(shapes, {}), context_dim=shapes["llm_adapter.norm.weight"][0])
    own = {name.removeprefix("llm_adapter."): tensor for name, tensor in weights.items()}
    load_into(adapter, own.items(), device="cpu", dtype=torch.float32)

    states, ids = golden.inputs[f"{case}/qwen_embeds"], golden.inputs[f"{case}/t5_ids"]
    qwen_mask, t5_mask = golden.inputs[f"{case}/qwen_mask"], golden.inputs[f"{case}/t5_mask"]
    with torch.no_grad():
        raw = adapter(states, ids, qwen_mask, t5_mask)
    assert relative_error(raw, golden.outputs[f"{case}/adapter_raw"]) < TOLERANCE
    zeroed = raw * t5_mask.unsqueeze(-1)
    assert relative_error(zeroed, golden.outputs[f"{case}/adapter_zeroed"]) < TOLERANCE
    if f"{case}/adapter_no_masks" in golden.outputs:
        assert relative_error(adapter(states, ids).detach(), golden.outputs[f"{case}/adapter_no_masks"]) < TOLERANCE


def test_sampling_loop(forward):
    golden = load_golden("anima/sampling_loop.safetensors")
    denoiser = golden_denoiser(forward)
    for case in golden.about["cases"]:
        tag, latents, times = case["tag"], [], []

        def predict(x, sigmas, context, latents=latents, times=times):
            if context is golden.inputs["positive_embeds"]:
                latents.append(x)
                times.append(sigmas)
            return denoiser(x, sigmas, context)

        noise = golden.inputs[f"{tag}/initial_noise"].squeeze(2)
        assert torch.equal(initial_noise(case["seed"], (case["width"], case["height"])), noise)
        with torch.no_grad():
            final = draw_flow(
                predict,
                noise,
                positive=golden.inputs["positive_embeds"],
                negative=golden.inputs["negative_embeds"] if case["guidance"] > 1 else None,
                settings=FlowSettings(steps=case["steps"], shift=case["flow_shift"], scale=case["guidance"]),
                seeds=[case["seed"]],
            )
        sigmas = flow_sigmas(case["steps"], case["flow_shift"])
        assert relative_error(sigmas, golden.outputs[f"{tag}/sigmas"]) < 1e-6
        assert relative_error(torch.cat(times), golden.outputs[f"{tag}/model_t"]) < 1e-6
        assert relative_error(torch.cat(latents), golden.outputs[f"{tag}/latents_at_step"].squeeze(2)) < TOLERANCE
        assert relative_error(final, golden.outputs[f"{tag}/final_latents"].squeeze(2)) < TOLERANCE


def test_names_are_those_of_the_file(forward):
    shapes = {name.removeprefix("net."): tuple(tensor.shape) for name, tensor in forward.weights.items()}
    assert expected_shapes(config_from_shapes(shapes, {}, {})) == shapes
