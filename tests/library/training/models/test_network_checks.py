"""Networks that cannot be what was meant, told before torch is imported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.files.safetensors_file import save_safetensors
from library.options.network import NetworkOptions
from library.training.models.network_checks import base_model, network_notices, network_problems

SD1_LAYER = "lora_unet_mid_block_attentions_0_proj_in"
FLUX_LAYER = "lora_unet_double_blocks_0_img_attn_qkv"


def options(module="networks.lora", *, v2=False, **given):
    network = NetworkOptions(network_module=module, **given)
    return SimpleNamespace(network=network, NETWORK_MODULE="networks.lora", OTHER_NETWORK_MODULES=(), MODEL="Stable Diffusion",
                           clip=SimpleNamespace(v2=v2))  # fmt: skip


def lora_file(path, layer=SD1_LAYER, **metadata):
    tensors = {f"{layer}.lora_down.weight": torch.zeros(1, 4), f"{layer}.lora_up.weight": torch.zeros(4, 1)}
    save_safetensors(path, tensors, metadata)
    return str(path)


def test_a_module_for_another_model():
    assert list(network_problems(options("networks.lora_anima"), "sd")) == [
        "--network_module=networks.lora_anima is for Anima, and this script trains Stable Diffusion: "
        "give --network_module=networks.lora"
    ]
    assert list(network_problems(options("lycoris.kohya", network_args=["algo=lokr"]), "sd")) == []
    assert list(network_problems(options(None), "sd")) == []


def test_arguments_of_own_modules():
    given = ["conv_dimm=4", "block_dims=1,2", "verbose"]
    assert list(network_problems(options(network_args=given), "sd")) == [
        "--network_args verbose: write it as key=value"
    ]  # fmt: skip
    problems = list(network_problems(options(network_args=given[:2]), "sd"))
    assert len(problems) == 2 and "did you mean conv_dim?" in problems[0] and "give 25" in problems[1]


@pytest.mark.parametrize("flag", ["network_weights", "base_weights"])
def test_files_of_another_model(tmp_path, flag):
    file = lora_file(tmp_path / "a.safetensors", FLUX_LAYER)
    given = {flag: [file] if flag == "base_weights" else file}
    (problem,) = network_problems(options(**given), "sd")
    assert problem.startswith(f"--{flag} {file} is a LoRA for FLUX, not for Stable Diffusion 1.x or 2.x")
    assert list(network_problems(options("lycoris.kohya", **given), "sd")) == []


def test_what_cannot_be_read_is_told_elsewhere(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    given = {"network_weights": str(tmp_path / "a.safetensors"), "base_weights": [str(tmp_path / "none.safetensors")]}
    assert list(network_problems(options(**given), "sd")) == []


@pytest.mark.parametrize(
    ("metadata", "v2", "told"),
    [
        ({"ss_base_model_version": "sd_v1"}, False, False),
        ({"ss_base_model_version": "sd_v1"}, True, True),
        ({"ss_base_model_version": "sd_v2_v"}, True, False),
        ({"ss_v2": "True"}, False, True),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, False, True),
        ({"ss_base_model_version": "my own"}, False, False),
        ({}, True, False),
    ],
)
def test_files_trained_on_another_base(tmp_path, metadata, v2, told):
    file = lora_file(tmp_path / "a.safetensors", **metadata)
    notices = list(network_notices(options(v2=v2, network_weights=file), "sd"))
    assert len(notices) == told
    if told:
        assert f"trained on {base_model(metadata)}, and this run's model is sd_v{2 if v2 else 1}" in notices[0]
    assert list(network_notices(options(v2=v2, network_weights=file), "anima")) == []
