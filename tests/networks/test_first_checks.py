"""What is told of a network before torch is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.training.models.networks import own_network_modules
from networks.first_checks import ARGUMENTS, MODELS, argument_problems, arguments_class, file_problem, modules_with

ROOT = Path(__file__).resolve().parents[2]


def test_every_own_module_says_what_it_is_for():
    assert set(MODELS) == set(own_network_modules())


def test_every_page_that_arguments_name_is_there():
    kinds = [kind for kinds in ARGUMENTS.values() for kind in kinds]
    assert all((ROOT / kind.PAGE).is_file() for kind in kinds) and set(ARGUMENTS) == set(own_network_modules())
    assert modules_with("train_llm_adapter") == ["networks.lora_anima"] and modules_with("mlp_lr") == []


def test_needs_no_torch():
    code = "import sys, networks.first_checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("architecture", "given", "said"),
    [
        ("sd", {"block_dims": "4,4"}, "block_dims has 2 values, and this U-Net has 25 blocks"),
        ("sdxl", {"block_dims": "4,4"}, "block_dims has 2 values, and this U-Net has 23 blocks"),
        ("sd", {"down_lr_weight": "cosin"}, r"down_lr_weight=cosin cannot be used: .*did you mean cosine"),
        ("lumina", {"embedder_dims": "4,4"}, r"embedder_dims=4,4 cannot be used: it has 2 values: give 3 ranks"),
        ("sd3", {"emb_dims": "[4,4]"}, r"emb_dims=\[4,4\] cannot be used: it has 2 values: give 6 ranks"),
        ("sd3", {"x_atn_dim": "4"}, r"x_atn_dim is not an argument of this network \(did you mean x_attn_dim\?\)"),
        (
            "anima",
            {"rank_droput": "0.1"},
            r"rank_droput is not an argument of this network \(did you mean rank_dropout\?\); see docs/",
        ),
        ("lumina", {"train_t5xxl": "true"}, r"train_t5xxl is not an .* network: it belongs to networks\.lora_sd3; drop it$"),
        ("sd3", {"refiner_dim": "4"}, r"network: it belongs to networks\.lora_lumina; drop it$"),
        ("sdxl", {"zzzz": "4"}, r"network; it knows exclude_patterns, "),
    ],
)
def test_arguments(architecture, given, said):
    (problem,) = argument_problems(arguments_class(architecture, v2=False), given)
    assert re.search(said, problem)


def test_flags_of_their_own_are_left_to_the_trainer():
    assert list(argument_problems(arguments_class("anima", v2=False), {"mlp_lr": "x"})) == []
    assert arguments_class("tiny", v2=False) is None


def test_files_of_another_model():
    keys = [f"lora_unet_double_blocks_0_img_attn_qkv.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
    kind = arguments_class("sdxl", v2=False)
    assert file_problem(kind, "--base_weights", "a.safetensors", keys).startswith(
        "--base_weights a.safetensors is a LoRA for FLUX, not for SDXL"
    )
    own = "lora_unet_input_blocks_4_1_proj_in"
    assert file_problem(kind, "--base_weights", "a", [f"{own}.lora_down.weight", f"{own}.lora_up.weight"]) is None
