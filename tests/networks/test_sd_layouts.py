"""Every module of Stable Diffusion and SDXL has its name in each layout, and names of no module have none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.sd.unet_names import HEAD, original_names
from networks.layout_names import COMFY, DIFFUSERS, NUMBER, OTHER_MODELS, OURS
from networks.lora_names import names_problem
from networks.sd_layouts import SD1_NAMES, SD2_NAMES, SDXL_NAMES
from tests.networks.sd_models import UNETS

TABLES = {"sd1": SD1_NAMES, "sd2": SD2_NAMES, "sdxl": SDXL_NAMES}


@pytest.mark.parametrize("kind", TABLES)
def test_every_name_leads_back(kind):
    for module in TABLES[kind].modules:
        for name in (*module.names.values(), *module.aliases):
            key = TABLES[kind].find(name.replace(NUMBER, "17") + ".lora_up.weight")
            assert key is not None and key.module is module, name
            assert key.written(OURS) == module.names[OURS].replace(NUMBER, "17") + ".lora_up.weight"


@pytest.mark.parametrize("kind", TABLES)
def test_every_layer_of_the_published_model(kind):
    paths = {path: theirs for path, theirs in original_names(UNETS[kind]).items() if path not in HEAD and "norm" not in path}
    assert len(paths) == {"sd1": 278, "sd2": 278, "sdxl": 788}[kind]
    for path, original in paths.items():
        ours = (original if kind == "sdxl" else path).replace(".", "_")
        key = TABLES[kind].find(f"lora_unet_{ours}.lora_down.weight")
        assert key is not None and key.name(OURS) == f"lora_unet_{ours}" and key.name(DIFFUSERS) == f"unet.{path}"
        for other in (f"diffusion_model.{original}", f"lora_unet_{path.replace('.', '_')}", path):
            again = TABLES[kind].find(f"{other}.lora_A.weight")
            assert again is not None and again.name(OURS) == key.name(OURS), other


@pytest.mark.parametrize(
    ("kind", "key", "ours"),
    [
        ("sd1", "lora_te1_text_model_encoder_layers_3_mlp_fc1.alpha", "lora_te_text_model_encoder_layers_3_mlp_fc1.alpha"),
        ("sd1", "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.lora_A.weight",
         "lora_te_text_model_encoder_layers_3_mlp_fc1.lora_down.weight"),
        ("sdxl", "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj.lora_linear_layer.up.weight",
         "lora_te2_text_model_encoder_layers_31_self_attn_q_proj.lora_up.weight"),
        ("sdxl", "text_encoder.encoder.layers.0.self_attn.out_proj.lora_B.weight",
         "lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight"),
        ("sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.processor.to_out_lora.down.weight",
         "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_out_0.lora_down.weight"),
        ("sdxl", "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k.lora.up.weight",
         "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k.lora_up.weight"),
    ],
)  # fmt: skip
def test_names_of_other_programs(kind, key, ours):
    meaning = TABLES[kind].find(key)
    assert meaning is not None and meaning.written(OURS) == ours


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd1", "lora_unet_conv_in"),
        ("sd1", "lora_unet_time_embedding_linear_1"),
        ("sd1", "lora_unet_down_blocks_3_attentions_0_proj_in"),
        ("sd1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        ("sdxl", "lora_unet_input_blocks_1_1_proj_in"),
        ("sdxl", "lora_unet_label_emb_0_0"),
        ("sdxl", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("sdxl", "lora_te2_text_projection"),
    ],
)
def test_names_of_no_module(kind, name):
    assert TABLES[kind].find(f"{name}.lora_up.weight") is None


def test_only_sd2_is_reshaped_for_diffusers():
    flat = {kind: [module for module in table.modules if module.linear_in] for kind, table in TABLES.items()}
    assert [len(flat[kind]) for kind in TABLES] == [0, 32, 0]
    assert all(module.linear_in == {DIFFUSERS} and "_proj_" in module.names[OURS] for module in flat["sd2"])


def test_comfy_takes_our_names():
    for table in TABLES.values():
        assert table.written_layout(COMFY) == OURS and table.written_layout(DIFFUSERS) == DIFFUSERS
        assert table.architecture in OTHER_MODELS


def test_the_tables_need_no_torch():
    code = "import sys, networks.sd_layouts; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0


SD_KEYS = [f"lora_te_text_model_encoder_layers_0_mlp_fc1.{part}" for part in ("lora_down.weight", "lora_up.weight")]
SDXL_KEYS = [
    f"lora_unet_{name}.{part}"
    for name in ("output_blocks_0_1_proj_in", "input_blocks_4_1_proj_in")  # the second is there in SD 1, too
    for part in ("lora_down.weight", "lora_up.weight")
]
FLUX_KEYS = [
    f"lora_{name}.{part}"
    for name in ("te1_text_model_encoder_layers_0_mlp_fc1", "unet_double_blocks_0_img_attn_qkv")
    for part in ("lora_down.weight", "lora_up.weight")
]
ANIMA_KEYS = [f"lora_unet_blocks_0_mlp_layer1.{part}" for part in ("lora_down.weight", "lora_up.weight")]
SHARED_KEYS = [f"lora_unet_down_blocks_1_attentions_0_proj_in.{part}" for part in ("lora_down.weight", "lora_up.weight")]


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("sd1", SD_KEYS + SHARED_KEYS, None),
        ("sdxl", SDXL_KEYS + SHARED_KEYS, None),
        (
            "sdxl",
            SD_KEYS + SHARED_KEYS,
            "is a LoRA for Stable Diffusion 1.x or 2.x, not for SDXL, which has no lora_te_text_model",
        ),
        ("sdxl", SD_KEYS, "is a LoRA for Stable Diffusion 1.x or 2.x, not for SDXL"),
        (
            "sd1",
            SDXL_KEYS + SHARED_KEYS,
            "is a LoRA for SDXL, not for Stable Diffusion 1.x or 2.x, which has no lora_unet_output",
        ),
        ("sdxl", FLUX_KEYS, "is a LoRA for FLUX, not for SDXL, which has no lora_unet_double_blocks_0_img_attn_qkv"),
        ("sd1", FLUX_KEYS, "is a LoRA for FLUX, not for Stable Diffusion 1.x or 2.x"),
        (
            "sd1",
            ANIMA_KEYS,
            "is a LoRA for Anima, not for Stable Diffusion 1.x or 2.x (its names are like lora_unet_blocks_0_mlp"
            "_layer1.lora_down.weight); choose",
        ),
        ("sd1", SD_KEYS[:1], "only one of lora_down and lora_up"),
        ("sd1", ["lora_unet_mid_block_resnets_0_conv1.lokr_w1"], "no plain LoRA but a LoKr file"),
    ],
)
def test_files_for_other_models_show_in_their_names(kind, keys, said):
    problem = names_problem("a.safetensors", keys, TABLES[kind])
    assert problem is None if said is None else said in (problem or "")
