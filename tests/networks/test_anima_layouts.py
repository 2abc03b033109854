"""Every module of Anima has the right name in each layout, and names of no module have none."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from networks.anima_layouts import ANIMA_NAMES
from networks.layout_names import COMFY, DIFFUSERS, NUMBER, OURS
from tests.networks.conftest import anima_linears, qwen_linears

PATHS = {
    **{path: "lora_unet_" for path in anima_linears(blocks=28, width=8, text_width=4, adapter_blocks=6)},
    **{
        path.removeprefix("model."): "lora_te_"
        for path in qwen_linears(layers=28, width=8)
        if path != "lm_head"  # tied to the embedding, and no LoRA target
    },
}
SPECS = os.environ.get("SPECS_DIR")


def test_every_path_that_can_be_trained():
    for path, prefix in PATHS.items():
        ours = prefix + path.replace(".", "_")
        key = ANIMA_NAMES.find(f"{ours}.lora_up.weight")
        comfy = f"diffusion_model.{path}" if prefix == "lora_unet_" else f"text_encoders.qwen3_06b.transformer.model.{path}"
        assert key is not None and key.written(OURS) == f"{ours}.lora_up.weight"
        assert key.written(COMFY) == f"{comfy}.lora_B.weight"
    assert len(PATHS) == 514 + 1 + 196  # 1: the adapter's output projection, which only other programs train


def test_every_name_leads_back_from_every_layout():
    for module in ANIMA_NAMES.modules:
        for layout, name in module.names.items():
            key = ANIMA_NAMES.find(name.replace(NUMBER, "17") + ".alpha")
            assert key is not None and key.module is module and key.layout == layout
            assert key.name(OURS) == module.names[OURS].replace(NUMBER, "17")


def test_diffusers_has_all_but_the_text_encoder():
    without = [module for module in ANIMA_NAMES.modules if DIFFUSERS not in module.names]
    assert {module.part for module in without} == {"text encoder"} and len(without) == 8


@pytest.mark.parametrize(
    ("wrong", "ours"),
    [
        ("diffusion_model.blocks.3.adaln_modulation.self_attn.1", "lora_unet_blocks_3_adaln_modulation_self_attn_1"),
        ("diffusion_model.blocks.27.adaln_modulation.cross_attn.2", "lora_unet_blocks_27_adaln_modulation_cross_attn_2"),
        ("diffusion_model.t.embedder.1.linear_2", "lora_unet_t_embedder_1_linear_2"),
    ],
)
def test_names_that_the_reference_s_converter_writes_wrongly_are_understood(wrong, ours):
    key = ANIMA_NAMES.find(f"{wrong}.lora_A.weight")
    assert key is not None and key.layout == COMFY and key.written(OURS) == f"{ours}.lora_down.weight"
    assert key.name(COMFY) != wrong


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_blocks_0_self_attn_o_proj",  # the adapter's word
        "lora_unet_llm_adapter_blocks_0_self_attn_output_proj",
        "lora_unet_blocks_0_mlp_layer3",
        "lora_unet_blocks__mlp_layer1",
        "lora_unet_blocks_a_mlp_layer1",
        "lora_unet_blocks.0.mlp.layer1",
        "diffusion_model.blocks.0.mlp_layer1",
        "diffusion_model.final_layer.adaln_modulation.3",
        "lora_te_layers_0_mlp_layer1",
        "transformer.blocks.0.mlp.layer1",
        "blocks.0.mlp.layer1",
        "",
    ],
)
def test_names_of_no_module(name):
    assert ANIMA_NAMES.find(f"{name}.lora_up.weight") is None


@pytest.mark.skipif(SPECS is None, reason="needs the published lists")
def test_the_published_list_of_modules():
    published = json.loads(gzip.decompress((Path(SPECS) / "lora" / "anima.json.gz").read_bytes()))
    modules = {name: facts["module"] for group in published["modules"].values() for name, facts in group.items()}
    assert len(modules) == 710
    for name, path in modules.items():
        key = ANIMA_NAMES.find(f"{name}.lora_down.weight")
        assert key is not None and key.name(COMFY).endswith(f".{path}")
