"""The U-Nets of SD 1, SD 2 and SDXL against recorded numbers: predictions, what is inside, and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.files.weights_source import changed
from library.sd.denoiser import build_unet, load_unet
from library.sd.unet import StableDiffusionUNet, transform
from library.sd.unet_layout import PREFIX, unet_part
from library.sd.unet_names import UNetConfig, expected_shapes, original_names
from library.sdxl.sizes import size_vector
from tests.golden.golden_files import Golden, load_golden, relative_error
from tests.library.sd.tiny_unets import MemorySource

FORWARD, GRADIENTS = 1e-4, 1e-3  # tolerances of the files' README
CASES = [("sd/sd1_unet", "a"), ("sd/sd1_unet", "b"), ("sd/sd1_unet", "c"), ("sd/sd2_unet", "a"), ("sd/sd2_unet", "b"),
         ("sdxl/sdxl_unet", "a"), ("sdxl/sdxl_unet", "b")]  # fmt: skip
INSIDE = {  # of the recorded model -> ours
    "conv_in": "conv_in",
    "time_embed": "time_embedding",
    "label_emb": "add_embedding",
    "middle_block": "mid_block.resnets.1",
    "down_block_0": "down_blocks.0.downsamplers.0",
}


def loaded(golden: Golden) -> StableDiffusionUNet:
    about = golden.about["config"]
    heads = {"heads": about["num_heads"]} if "num_heads" in about else {"head_dim": about["head_dim"]}
    config = {"norm_groups": about["norm_num_groups"], **heads}
    source = MemorySource(golden.weights, config=config, path=Path("golden"))
    part = unet_part(source, prefix=PREFIX, layout="original")
    unet = build_unet(part.config)
    load_unet(unet, part, device="cpu", dtype=torch.float32)
    return unet


def inputs_of(golden: Golden, case: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    given = {name.removeprefix(f"{case}/"): value for name, value in golden.inputs.items() if name.startswith(f"{case}/")}
    if "pooled" not in given:
        return given["latents"], given["timesteps"], given["context"], None
    context = torch.cat((given["hidden1"], given["hidden2"]), dim=-1)
    return given["latents"], given["timesteps"], context, vector_of(golden, case)


def vector_of(golden: Golden, case: str) -> Tensor:
    sizes = (golden.inputs[f"{case}/{name}"].flip(-1) for name in ("original_size_hw", "crop_top_left", "target_size_hw"))
    return size_vector(golden.inputs[f"{case}/pooled"], *sizes)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_prediction_and_what_is_inside(name, case):
    golden = load_golden(f"{name}.safetensors")
    unet, seen = loaded(golden), {}
    for place, path in INSIDE.items():
        if f"{case}/inter/{place}" in golden.outputs:
            unet.get_submodule(path).register_forward_hook(lambda _, __, out, place=place: seen.update({place: out}))
    with torch.no_grad():
        prediction = unet.predict(*inputs_of(golden, case))
    assert relative_error(prediction, golden.outputs[f"{case}/pred"]) < FORWARD
    assert {f"{case}/inter/{place}" for place in seen} == {key for key in golden.outputs if key.startswith(f"{case}/inter/")}
    for place, value in seen.items():
        assert relative_error(value, golden.outputs[f"{case}/inter/{place}"]) < FORWARD, place


@pytest.mark.parametrize(("name", "case"), CASES)
def test_gradients(name, case):
    golden = load_golden(f"{name}.safetensors")
    unet, prefix = loaded(golden), f"{case}/grad/{PREFIX}"
    expected = {key.removeprefix(prefix): value for key, value in golden.outputs.items() if key.startswith(prefix)}
    modules = {
        f"{original}.{leaf}": f"{module}.{leaf}"
        for module, original in original_names(unet.sizes).items()
        for leaf in ("weight", "bias")
    }
    weights = {name: unet.get_parameter(modules[name]).requires_grad_() for name in expected}
    loss = (unet.predict(*inputs_of(golden, case)) - golden.inputs[f"{case}/target"]).square().mean()
    assert relative_error(loss.detach(), golden.outputs[f"{case}/loss"]) < FORWARD
    for (name, value), gradient in zip(expected.items(), torch.autograd.grad(loss, list(weights.values())), strict=True):
        assert relative_error(gradient, value.reshape(gradient.shape)) < GRADIENTS, name


@pytest.mark.parametrize("case", ["a", "b"])
def test_sizes_become_waves(case):
    golden = load_golden("sdxl/sdxl_unet.safetensors")
    vector = vector_of(golden, case)
    assert relative_error(vector, golden.outputs[f"{case}/vector"]) < 1e-5
    assert relative_error(vector[:, -1536:], golden.outputs[f"{case}/size_embedding"]) < 1e-5


@pytest.mark.parametrize("linear", [True, False])
def test_a_spatial_transformer_of_the_real_kind(linear):
    """SD 2's projections are matrices in its files; as 1x1 convolutions they give the same."""
    golden = load_golden("sd/sd2_spatial_transformer_head64.safetensors")
    about = golden.about["config"]
    width = about["channels"]
    config = UNetConfig(widths=(width,), depths=(1,), middle_depth=1, heads=(about["num_heads"],), time_width=8, norm_groups=32,
                        context_width=about["context_dim"], linear_projections=linear)  # fmt: skip
    transformer = build_unet(config).down_blocks[0].attentions[0]
    place = f"{PREFIX}input_blocks.1.1."
    shapes = {name: shape for name, shape in expected_shapes(config).items() if name.startswith("down_blocks.0.attentions.0.")}
    weights = {key.removeprefix(place): value.float() for key, value in golden.weights.items()}
    assert {name.removeprefix("down_blocks.0.attentions.0.") for name in shapes} == set(weights)
    as_stored = "matrix" if linear else "convolution"
    weights = {
        name: changed(value, as_stored) if "proj_" in name and "weight" in name and "ff" not in name else value
        for name, value in weights.items()
    }
    transformer.load_state_dict(weights, assign=True)
    x = golden.inputs["x"].clone().requires_grad_()
    weight = transformer.transformer_blocks[0].attn1.to_k.weight.requires_grad_()
    y = transform(run, transformer, x, golden.inputs["context"])
    assert relative_error(y.detach(), golden.outputs["y"]) < FORWARD

    loss = y.square().mean()
    assert relative_error(loss.detach(), golden.outputs["loss"]) < FORWARD
    grad_x, grad_weight = torch.autograd.grad(loss, [x, weight])
    assert relative_error(grad_x, golden.outputs["grad_x"]) < GRADIENTS
    ((_, expected),) = ((key, value) for key, value in golden.outputs.items() if key.startswith("grad/"))
    assert relative_error(grad_weight, expected) < GRADIENTS


def run(block: nn.Module, x: Tensor, *inputs: object) -> Tensor:
    return block(x, *inputs)
