"""Every key that we write is one that ComfyUI looks for, with shapes that it can add to the weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors
from tests.networks.comfy_rules import applied, denoiser_names, encoder_names
from tests.networks.full_anima_lora import METADATA, full_lora

PUBLISHED = json.loads((Path(__file__).parents[1] / "library" / "anima" / "published_keys.json").read_text(encoding="utf-8"))
QWEN_LAYERS = 28
QWEN_LAYER = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "self_attn.q_proj",
              "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
QWEN = "qwen3_06b.transformer.model."


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
    return [f"{QWEN}{name}.weight" for name in inside]


def accepted_names(*, newer: bool) -> dict[str, str]:
    """Name of a module -> the weight that it changes."""
    return denoiser_names(denoiser_weights()) | encoder_names(encoder_weights(), inside=QWEN, newer=newer)


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
    changes, left = applied(saved(network, tmp_path / "a.safetensors", "comfy"), accepted_names(newer=newer))
    assert left == set() and len(changes) == len(network.loras) == 710
    wanted = {lora.lora_name: lora.scale * lora.lora_up.weight @ lora.lora_down.weight for lora in network.loras}
    for weight, change in changes.items():
        is_encoder = weight.startswith("qwen3_06b.")
        path = weight.removeprefix(QWEN).removesuffix(".weight").replace(".", "_")
        torch.testing.assert_close(change, wanted[f"{'lora_te' if is_encoder else 'lora_unet'}_{path}"])


def test_all_of_our_own_file_is_taken_by_newer_versions(network, tmp_path):
    tensors = saved(network, tmp_path / "a.safetensors", None)
    changes, left = applied(tensors, accepted_names(newer=True))
    assert left == set() and len(changes) == 710
    changes, left = applied(tensors, accepted_names(newer=False))
    assert len(changes) == 514 and {key.partition("_layers")[0] for key in left} == {"lora_te"}
