"""LoRA for Stable Diffusion 3 against recorded numbers: which modules arguments give, and pairs of q, k and v apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_files import Golden, load_golden, load_golden_json, relative_error
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from networks import lora_sd3
from networks.fused_parts import blocks_of
from networks.layer import SplitLoRAModule
from tests.networks.sd3_models import denoiser_of, text_encoders

pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the files' headers
LAYERS = ("context_block.attn.qkv", "x_block.attn.qkv", "x_block.attn2.qkv")
KINDS = {"sd3m": "sd3_medium", "sd35m": "sd35_medium"}
SAVED = "saved_state_dict/"


@pytest.mark.parametrize(("kind", "variant"), [("sd3m", "default"), ("sd35m", "typed")])
def test_names_shapes_and_alphas(kind, variant):
    recorded = load_golden_json(f"sd3/lora_names_{kind}.json")["variants"][variant]
    given = dict(recorded["options"])
    dim, alpha = given.pop("network_dim"), given.pop("network_alpha")
    network = lora_sd3.create_network(
        1.0, dim, alpha, None, text_encoders(t5=False), denoiser_of(KINDS[kind]), **{key: str(v) for key, v in given.items()}
    )
    found = {
        made.lora_name: [list(made.lora_down.weight.shape), list(made.lora_up.weight.shape), float(made.alpha)]
        for made in network.loras
    }
    assert found == {name: facts for name, *facts in recorded["modules"]}
    assert (len(network.text_encoder_loras), len(network.unet_loras)) == (
        recorded["count_text_encoder"],
        recorded["count_unet"],
    )


@pytest.fixture
def golden() -> Golden:
    return load_golden("sd3/lora_split_qkv.safetensors")


def block_of(golden: Golden) -> nn.Module:
    """The first joint block's Linears that have weights in the file, and the others that have a LoRA."""
    width = golden.about["config"]["hidden"]
    root = nn.Module()
    for stream, attentions in {"context_block": ("attn",), "x_block": ("attn", "attn2")}.items():
        half = nn.ModuleDict({name: nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
                              for name in attentions})  # fmt: skip
        root.add_module(stream, half)
    model = nn.Module()
    model.add_module("joint_blocks", nn.ModuleList([root]))
    prefix = "model.diffusion_model."
    model.load_state_dict({key.removeprefix(prefix): value.float() for key, value in golden.weights.items()}, strict=False)
    return model.requires_grad_(False)


def applied(golden: Golden) -> tuple[nn.Module, lora_sd3.LoRANetwork]:
    model, about = block_of(golden), golden.about["config"]
    network = lora_sd3.create_network(1.0, about["rank"], about["alpha"], None, None, model, split_qkv="True")
    network.apply_to(None, model)
    recorded = {key.removeprefix("split_parameters/"): value for key, value in golden.inputs.items() if key != "x"}
    for made in network.loras:
        for half, layer in (("lora_down", made.lora_down), ("lora_up", made.lora_up)):
            parts = [recorded.get(f"{made.lora_name}.{half}.{part}.weight") for part in range(3)]
            found = recorded.get(f"{made.lora_name}.{half}.weight")
            whole = found if found is not None else torch.cat([part for part in parts if part is not None])
            with torch.no_grad():
                layer.weight.copy_(whole)
    return model, network


@torch.no_grad()
def test_forward(golden):
    model, _ = applied(golden)
    for path in LAYERS:
        out = model.get_submodule(f"joint_blocks.0.{path}")(golden.inputs["x"])
        assert relative_error(out, golden.outputs[f"forward/{path}"]) <= TOLERANCE, path


@torch.no_grad()
def test_the_saved_file(golden, tmp_path):
    """The tensors are the recorded ones; alpha is that of the whole pair, so that readers get the strength of the training."""
    model, network = applied(golden)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    saved = dict(read_tensors(read_header(tmp_path / "a.safetensors")))
    recorded = {key.removeprefix(SAVED): value for key, value in golden.outputs.items() if key.startswith(SAVED)}
    assert set(saved) == set(recorded)
    for key, value in recorded.items():
        factor = 3 if key.endswith("qkv.alpha") else 1
        assert torch.equal(saved[key], value * factor), key
    for path in LAYERS:
        name = f"lora_unet_joint_blocks_0_{path.replace('.', '_')}"
        down, up = saved[f"{name}.lora_down.weight"], saved[f"{name}.lora_up.weight"]
        layer = model.get_submodule(f"joint_blocks.0.{path}")
        change = up @ down * float(saved[f"{name}.alpha"]) / down.shape[0]
        as_read = F.linear(golden.inputs["x"], layer.weight + change, layer.bias)
        assert relative_error(as_read, golden.outputs[f"forward/{path}"]) <= TOLERANCE, path


@torch.no_grad()
def test_the_recorded_file_is_read_as_strong_as_it_was_trained(golden, tmp_path):
    recorded = {key.removeprefix(SAVED): value for key, value in golden.outputs.items() if key.startswith(SAVED)}
    metadata = {"ss_network_args": '{"split_qkv": "True"}', "ss_network_alpha": str(golden.about["config"]["alpha"])}
    save_safetensors(tmp_path / "theirs.safetensors", recorded, metadata)
    assert float(golden.outputs["file_forward_ratio"]) == pytest.approx(1 / 3, rel=1e-3)  # by the file alone
    model = block_of(golden)
    network, _ = lora_sd3.create_network_from_weights(1.0, tmp_path / "theirs.safetensors", None, None, model)
    network.apply_to(None, model)
    network.load_weights(tmp_path / "theirs.safetensors")
    for path in LAYERS:
        out = model.get_submodule(f"joint_blocks.0.{path}")(golden.inputs["x"])
        assert relative_error(out, golden.outputs[f"forward/{path}"]) <= TOLERANCE, path
    made = next(made for made in network.loras if made.lora_name.endswith("x_block_attn_qkv"))
    assert isinstance(made, SplitLoRAModule)
    assert blocks_of(made.file_tensors()["lora_up.weight"], made.parts) is not None
