"""Every key that we write is one that ComfyUI looks for, with shapes that it can add to the weight.

ComfyUI's rules (comfy/lora.py, comfy/weight_adapter/lora.py): for each weight of the loaded model it knows some names of
modules, and for each name it looks for pairs of endings; what nothing looks for is left out with a line in the log.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors
from tests.networks.full_anima_lora import METADATA, full_lora

PUBLISHED = json.loads((Path(__file__).parents[1] / "library" / "anima" / "published_keys.json").read_text(encoding="utf-8"))
QWEN_LAYERS = 28
QWEN_LAYER = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "self_attn.q_proj",
              "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
)  # of those it looks for, the two we write


def denoiser_weights() -> list[str]:
    return [
        *PUBLISHED["once"],
        *(f"blocks.{n}.{name}" for n in range(PUBLISHED["blocks"]) for name in PUBLISHED["per_block"]),
        *(
            f"llm_adapter.blocks.{n}.{name}"
            for n in range(PUBLISHED["adapter_blocks"])
            for name in PUBLISHED["per_adapter_block"]
        ),
    ]


def encoder_weights() -> list[str]:
    inside = ["embed_tokens", "norm", *(f"layers.{n}.{name}" for n in range(QWEN_LAYERS) for name in QWEN_LAYER)]
    return [f"qwen3_06b.transformer.model.{name}.weight" for name in inside]


def accepted_names(*, newer: bool) -> dict[str, str]:
    """Name of a module -> the weight that it changes. Older versions know no lora_te_ names for this text encoder."""
    names = {}
    for key in denoiser_weights():
        path = key.removesuffix(".weight")
        names[f"lora_unet_{path.replace('.', '_')}"] = names[f"diffusion_model.{path}"] = key
    for key in encoder_weights():
        path = key.removesuffix(".weight")
        names[f"text_encoders.{path}"] = key
        if newer:
            inside = path.removeprefix("qwen3_06b.transformer.model.")
            names[f"lora_te_{inside.replace('.', '_')}"] = key
            names[path.removeprefix("qwen3_06b.")] = key
    return names


def applied(tensors: dict[str, torch.Tensor], *, newer: bool) -> tuple[dict[str, torch.Tensor], set[str]]:
    """What ComfyUI adds to each weight, and the keys that it leaves out."""
    changes, left = {}, set(tensors)
    for name, weight in accepted_names(newer=newer).items():
        for up_ending, down_ending in PAIRS:
            up, down = tensors.get(name + up_ending), tensors.get(name + down_ending)
            if up is None or down is None:
                continue
            alpha = tensors.get(f"{name}.alpha")
            strength = 1.0 if alpha is None else float(alpha) / down.shape[0]
            assert weight not in changes
            changes[weight] = strength * up @ down
            left -= {name + up_ending, name + down_ending, f"{name}.alpha"}
    return changes, left


@pytest.fixture(scope="module")
def network():
    return full_lora()


def saved(network, path: Path, layout: str | None) -> dict[str, torch.Tensor]:
    if layout is None:
        network.save_weights(path, None, METADATA)
    else:
        network.save_weights_as(layout, path, None, METADATA)
    return dict(read_tensors(read_header(path)))


def test_the_published_lists_are_whole():
    assert len(denoiser_weights()) == PUBLISHED["tensors"] and len(encoder_weights()) == 310


@pytest.mark.parametrize("newer", [True, False])
def test_all_of_a_comfy_file_is_taken(network, newer, tmp_path):
    changes, left = applied(saved(network, tmp_path / "a.safetensors", "comfy"), newer=newer)
    assert left == set() and len(changes) == len(network.loras) == 710
    wanted = {lora.lora_name: lora.scale * lora.lora_up.weight @ lora.lora_down.weight for lora in network.loras}
    for weight, change in changes.items():
        is_encoder = weight.startswith("qwen3_06b.")
        path = weight.removeprefix("qwen3_06b.transformer.model.").removesuffix(".weight").replace(".", "_")
        torch.testing.assert_close(change, wanted[f"{'lora_te' if is_encoder else 'lora_unet'}_{path}"])


def test_all_of_our_own_file_is_taken_by_newer_versions(network, tmp_path):
    tensors = saved(network, tmp_path / "a.safetensors", None)
    changes, left = applied(tensors, newer=True)
    assert left == set() and len(changes) == 710
    changes, left = applied(tensors, newer=False)
    assert len(changes) == 514 and {key.partition("_layers")[0] for key in left} == {"lora_te"}
