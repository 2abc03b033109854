"""Every module of Lumina Image 2.0 has the right name in each layout, and names of no module have none."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from networks.layout_names import COMFY, DIFFUSERS, OURS, model_of_lora
from networks.lora_names import names_problem
from networks.lumina_layouts import FUSED, LUMINA_NAMES, all_rows, qkv_split
from tests.networks.lumina_models import PUBLISHED, denoiser_linears, gemma_linears

TEXT = gemma_linears(layers=26, width=1, heads_width=1, kv_width=1, hidden=1)
PATHS = {
    **{path: "lora_unet_" for path in denoiser_linears(**PUBLISHED)},
    **{path.removeprefix("model."): "lora_te_" for path in TEXT},
}
SPECS = os.environ.get("SPECS_DIR")


def test_every_path_that_can_be_trained():
    for path, prefix in PATHS.items():
        ours = prefix + path.replace(".", "_")
        key = LUMINA_NAMES.find(f"{ours}.lora_up.weight")
        comfy = "diffusion_model." if prefix == "lora_unet_" else "text_encoders.gemma2_2b.transformer.model."
        assert key is not None and key.written(OURS) == f"{ours}.lora_up.weight"
        assert key.written(COMFY) == f"{comfy}{path}.lora_B.weight"
    assert len(PATHS) == 184 + 182


@pytest.mark.skipif(not SPECS, reason="needs the published lists")
def test_the_published_list_of_modules():
    published = json.loads(gzip.decompress((Path(SPECS or "") / "lora" / "lumina2.json.gz").read_bytes()))
    modules = {name: facts["module"] for group in published["modules"].values() for name, facts in group.items()}
    assert set(modules.values()) == set(PATHS)
    for name, path in modules.items():
        key = LUMINA_NAMES.find(f"{name}.lora_down.weight")
        assert key is not None and key.name(COMFY).endswith(f".{path}")


def test_diffusers_has_all_but_the_text_encoder():
    without = [module for module in LUMINA_NAMES.modules if not module.all_names(DIFFUSERS)]
    assert {module.part for module in without} == {"text encoder"} and len(without) == 7
    assert sum(module.fused is not None for module in LUMINA_NAMES.modules) == len(FUSED) == 3


@pytest.mark.parametrize(
    ("path", "theirs"),
    [
        ("layers_25_attention_out", "layers.25.attn.to_out.0"),
        ("noise_refiner_1_feed_forward_w3", "noise_refiner.1.feed_forward.linear_3"),
        ("layers_3_adaLN_modulation_1", "layers.3.norm1.linear"),
        ("final_layer_adaLN_modulation_1", "norm_out.linear_1"),
        ("final_layer_linear", "norm_out.linear_2"),
        ("t_embedder_mlp_2", "time_caption_embed.timestep_embedder.linear_2"),
        ("cap_embedder_1", "time_caption_embed.caption_embedder.1"),
        ("x_embedder", "x_embedder"),
    ],
)
def test_names_in_diffusers(path, theirs):
    key = LUMINA_NAMES.find(f"lora_unet_{path}.alpha")
    assert key is not None and key.name(DIFFUSERS) == f"transformer.{theirs}"


@pytest.mark.parametrize("blocks", ["layers.25", "noise_refiner.1", "context_refiner.0"])
def test_names_of_q_k_and_v_in_diffusers(blocks):
    key = LUMINA_NAMES.find(f"diffusion_model.{blocks}.attention.qkv.lora_A.weight")
    assert key is not None and key.all_names(DIFFUSERS) == tuple(f"transformer.{blocks}.attn.to_{name}" for name in "qkv")
    for projection, name in enumerate(key.all_names(DIFFUSERS)):
        theirs = LUMINA_NAMES.find(f"{name}.lora_B.weight")
        assert theirs is not None and theirs.module is key.module and theirs.projection == projection
        assert theirs.name(OURS) == f"lora_unet_{blocks.replace('.', '_')}_attention_qkv"


def test_rows_of_q_k_and_v():
    assert qkv_split(3840, 2304) == (2304, 768, 768)
    for known in ((2304, 768, 768), (None, 768, None), (None, None, 768)):
        assert all_rows(known, 2304) == 3840
    assert all_rows((2304, None, None), 2304) is None  # how wide k and v are cannot be known


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_layers_0_attention_to_q",  # only the fused layer is there
        "lora_unet_context_refiner_0_adaLN_modulation_1",  # which has none
        "lora_unet_layers__attention_out",
        "lora_unet_norm_final",
        "diffusion_model.layers.0.attention_qkv",
        "lora_te_layers_0_attention_qkv",
        "lora_te_layers_0_mlp_w1",
        "",
    ],
)
def test_names_of_no_module(name):
    assert LUMINA_NAMES.find(f"{name}.lora_up.weight") is None


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "transformer."])
def test_the_denoisers_names_are_known_as_lumina_s(prefix):
    dot = "_" if prefix == "lora_unet_" else "."
    for path in ("layers.0.attention.qkv", "layers.7.feed_forward.w1", "context_refiner.1.attention.out", "noise_refiner.0.x"):
        assert model_of_lora([prefix + path.replace(".", dot) + ".lora_down.weight"]) == LUMINA_NAMES.architecture


def test_z_image_is_another_model_with_some_of_the_names():
    for path in ("layers_0_attention_to_q", "layers_3_adaLN_modulation_0"):
        keys = [f"lora_unet_{name}.lora_{half}.weight" for name in (path, "layers_0_feed_forward_w1") for half in ("down", "up")]
        assert names_problem("a", keys, LUMINA_NAMES).startswith("a is a LoRA for Z-Image, not for Lumina Image 2.0")
