"""Every module of Stable Diffusion 3 has the right name in each layout; fused layers are kept apart there and joined here."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError
from networks.layout_names import ALPHA, COMFY, DIFFUSERS, DOWN, NUMBER, OURS, UP, understood
from networks.lora_formats import by_our_name, convert
from networks.lora_names import names_problem
from networks.sd3_layouts import BLOCK, EMBEDDERS, SD3_NAMES, T5_PATHS

SPECS = os.environ.get("SPECS_DIR")
KINDS = ("sd3_medium", "sd35_medium", "sd35_large")
QKV = "lora_unet_joint_blocks_4_x_block_attn_qkv"
THEIRS = "transformer.transformer_blocks.4.attn"


def in_our_names(tensors: dict[str, torch.Tensor]):
    return by_our_name("a file", tensors, understood("a file", tensors, SD3_NAMES))


def converted(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    return convert("a file", in_our_names(tensors), layout).tensors


def change(tensors: dict[str, torch.Tensor], name: str, *, ends: tuple[str, str] = ("lora_down", "lora_up")) -> torch.Tensor:
    down, up = (tensors[f"{name}.{end}.weight"] for end in ends)
    return up @ down * float(tensors.get(f"{name}.alpha", torch.tensor(float(down.shape[0])))) / down.shape[0]


def pair(name: str, rank: int, rows: int, inputs: int, *, alpha: float | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, inputs, generator=generator),
        f"{name}.lora_up.weight": torch.randn(rows, rank, generator=generator),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


# --- names


def test_every_name_leads_back_from_every_layout():
    for module in SD3_NAMES.modules:
        for layout in (OURS, DIFFUSERS):
            for name in module.all_names(layout):
                key = SD3_NAMES.find(name.replace(NUMBER, "17") + ".alpha")
                assert key is not None and key.module is module and key.layout == layout
                assert key.name(layout) == name.replace(NUMBER, "17")
                assert key.name(OURS) == module.names[OURS].replace(NUMBER, "17")


def test_diffusers_has_all_but_t5():
    without = [module for module in SD3_NAMES.modules if not module.all_names(DIFFUSERS)]
    assert {module.part for module in without} == {"text encoder"} and len(without) == len(T5_PATHS) == 7


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("transformer.transformer_blocks.3.attn.to_k", "lora_unet_joint_blocks_3_x_block_attn_qkv"),
        ("transformer.transformer_blocks.3.attn2.to_out.0", "lora_unet_joint_blocks_3_x_block_attn2_proj"),
        ("transformer.transformer_blocks.3.attn.add_v_proj", "lora_unet_joint_blocks_3_context_block_attn_qkv"),
        ("transformer.time_text_embed.text_embedder.linear_2", "lora_unet_y_embedder_mlp_2"),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", "lora_te2_text_model_encoder_layers_31_mlp_fc1"),
        ("text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo", "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo"),
        ("diffusion_model.joint_blocks.3.x_block.attn.qkv", "lora_unet_joint_blocks_3_x_block_attn_qkv"),
        ("text_encoders.t5xxl.transformer.encoder.block.9.layer.0.SelfAttention.q", "lora_te3_encoder_block_9_layer_0_SelfAttention_q"),
    ],
)  # fmt: skip
def test_names_of_others_are_read(theirs, ours):
    key = SD3_NAMES.find(f"{theirs}.lora_A.weight")
    assert key is not None and key.name(OURS) == ours


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_joint_blocks_0_x_block_attn3_qkv",
        "lora_unet_joint_blocks_0_context_block_attn2_qkv",
        "lora_unet_joint_blocks_a_x_block_attn_qkv",
        "transformer.transformer_blocks.0.attn.to_qkv",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "lora_te4_encoder_block_0_layer_0_SelfAttention_q",
        "",
    ],
)
def test_names_of_no_module(name):
    assert SD3_NAMES.find(f"{name}.lora_up.weight") is None


def test_our_names_are_what_is_written_for_comfyui():
    assert SD3_NAMES.written_layout(COMFY) == OURS


@pytest.mark.skipif(SPECS is None, reason="needs the published lists")
@pytest.mark.parametrize("kind", KINDS)
def test_the_published_list_of_modules(kind):
    published = json.loads(gzip.decompress((Path(SPECS or "") / "lora" / f"{kind}.json.gz").read_bytes()))
    modules = {name: facts["module"] for group in published["modules"].values() for name, facts in group.items()}
    for name, path in modules.items():
        key = SD3_NAMES.find(f"{name}.lora_down.weight")
        assert key is not None and key.written(OURS) == f"{name}.lora_down.weight"
        assert path.replace(".", "_") in name


def test_every_path_stands_in_diffusers_converter():
    """By the names that its converter of checkpoints makes of ours."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    from library.sd3.layout import expected_shapes
    from tests.networks.sd3_models import KINDS as CONFIGS

    weights = {f"{path}.weight" for path in (*(f"joint_blocks.0.{inner}" for inner in BLOCK), *EMBEDDERS)}
    shapes = expected_shapes(CONFIGS["sd35_medium"])
    assert weights <= set(shapes)
    made = utils.convert_sd3_transformer_checkpoint_to_diffusers({key: torch.zeros(6, 1) for key in shapes})
    theirs = {key for key in made if key.endswith(".weight") and ("transformer_blocks.0." in key or "blocks" not in key)}
    ours = {f"{name}.weight".removeprefix("transformer.").replace(NUMBER, "0")
            for module in SD3_NAMES.modules if module.part == "denoiser" for name in module.all_names(DIFFUSERS)}  # fmt: skip
    assert {name for name in theirs if "norm_" not in name or "norm_out" in name} == ours


# --- fused layers


def test_one_pair_becomes_three_that_share_its_down_half():
    tensors = pair(QKV, 4, 24, 8, alpha=2.0)
    theirs = converted(tensors, DIFFUSERS)
    assert set(theirs) == {f"{THEIRS}.to_{name}.lora_{half}.weight" for name in "qkv" for half in "AB"}
    whole = torch.cat([change(theirs, f"{THEIRS}.to_{name}", ends=("lora_A", "lora_B")) for name in "qkv"])
    torch.testing.assert_close(whole, change(tensors, QKV))
    again = converted(theirs, OURS)
    assert torch.equal(again[f"{QKV}.lora_down.weight"], tensors[f"{QKV}.lora_down.weight"])
    torch.testing.assert_close(change(again, QKV), change(tensors, QKV))


def test_three_pairs_stay_what_they_are():
    tensors = pair(QKV, 6, 24, 8, alpha=3.0)
    ups = [torch.randn(8, 2) for _ in "qkv"]
    tensors[f"{QKV}.lora_up.weight"] = torch.block_diag(*ups)
    theirs = converted(tensors, DIFFUSERS)
    for place, name in enumerate("qkv"):
        down = tensors[f"{QKV}.lora_down.weight"][2 * place : 2 * place + 2]
        assert torch.equal(theirs[f"{THEIRS}.to_{name}.lora_A.weight"], down)
        assert torch.equal(theirs[f"{THEIRS}.to_{name}.lora_B.weight"], ups[place] * 0.5)
    again = converted(theirs, OURS)
    assert again[f"{QKV}.lora_up.weight"].shape == (24, 6)
    torch.testing.assert_close(change(again, QKV), change(tensors, QKV))


@pytest.mark.parametrize("present", ["qkv", "qv", "k", "kv"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_what_is_not_there_changes_nothing(present, alpha):
    ranks = {"q": 3, "k": 2, "v": 4}
    tensors = {}
    for name in present:
        tensors |= pair(f"{THEIRS}.to_{name}", ranks[name], 8, 5, alpha=alpha, seed=ranks[name])
    joined = converted(tensors, OURS)
    wanted = [change(tensors, f"{THEIRS}.to_{name}") if name in present else torch.zeros(8, 5) for name in "qkv"]
    torch.testing.assert_close(change(joined, QKV), torch.cat(wanted))
    assert joined[f"{QKV}.lora_down.weight"].shape[0] == sum(ranks[name] for name in present)


def test_the_whole_and_a_part_of_it_are_one_too_many():
    tensors = {**pair(QKV, 2, 24, 8), **pair(f"{THEIRS}.to_q", 2, 8, 8)}
    with pytest.raises(CheckpointError, match="1 parts are there twice, under names of several layouts"):
        in_our_names(tensors)


def test_sizes_that_do_not_fit_together():
    tensors = {**pair(f"{THEIRS}.to_q", 2, 8, 8), **pair(f"{THEIRS}.to_k", 2, 6, 8)}
    with pytest.raises(CheckpointError, match=r"its projections have \[8, 6, None\] rows .* cannot be told"):
        in_our_names(tensors)


def test_torn_projections_are_named():
    tensors = pair(f"{THEIRS}.to_q", 2, 8, 8) | pair(f"{THEIRS}.to_k", 2, 8, 8)
    del tensors[f"{THEIRS}.to_q.lora_up.weight"], tensors[f"{THEIRS}.to_k.lora_down.weight"]
    with pytest.raises(CheckpointError, match=rf"2 modules have no fitting pair .*{THEIRS}.to_q"):
        in_our_names(tensors)
    assert "2 modules have only one of lora_down and lora_up" in str(names_problem("a file", tensors, SD3_NAMES))


# --- shift and scale


@pytest.mark.parametrize(
    ("name", "theirs", "rows", "is_swapped"),
    [
        ("lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear", 16, True),
        # the last block's makes shift and scale alone
        ("lora_unet_joint_blocks_5_context_block_adaLN_modulation_1", "transformer.transformer_blocks.5.norm1_context.linear", 16, True),
        ("lora_unet_joint_blocks_4_context_block_adaLN_modulation_1", "transformer.transformer_blocks.4.norm1_context.linear", 48, False),
        ("lora_unet_joint_blocks_5_x_block_adaLN_modulation_1", "transformer.transformer_blocks.5.norm1.linear", 48, False),
        ("lora_unet_y_embedder_mlp_0", "transformer.time_text_embed.text_embedder.linear_1", 16, False),
    ],
)  # fmt: skip
def test_shift_and_scale_change_places(name, theirs, rows, is_swapped):
    tensors = pair(name, 2, rows, 8, alpha=2.0)
    found = converted(tensors, DIFFUSERS)
    up = tensors[f"{name}.lora_up.weight"]
    assert torch.equal(found[f"{theirs}.lora_B.weight"], torch.cat((up[rows // 2 :], up[: rows // 2])) if is_swapped else up)
    assert torch.equal(converted(found, OURS)[f"{name}.lora_up.weight"], up)


def test_parts_of_a_key():
    keys = [SD3_NAMES.find(f"{THEIRS}.to_v.{end}") for end in ("lora_A.weight", "lora_B.weight", "alpha")]
    assert [key.part for key in keys if key] == [DOWN, UP, ALPHA]
    assert {(key.projection, key.number, key.layout) for key in keys if key} == {(2, "4", DIFFUSERS)}
