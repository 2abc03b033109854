"""U-Nets read off names and shapes, in both layouts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from library.errors import CheckpointError
from library.sd.unet_layout import PREFIX, unet_part
from library.sd.unet_names import Shapes, UNetConfig, expected_shapes, original_names
from tests.library.sd.tiny_unets import SD1, SDXL, MemorySource, settings

SPECS = os.environ.get("SPECS_DIR")
SD_WIDTHS = {"widths": (320, 640, 1280, 1280), "depths": (1, 1, 1, 0), "middle_depth": 1, "time_width": 1280}
PUBLISHED = {
    "sd15": UNetConfig(**SD_WIDTHS, heads=(8, 8, 8, 8), context_width=768),
    "sd21": UNetConfig(**SD_WIDTHS, heads=(5, 10, 20, 20), context_width=1024),
    "sdxl_base": UNetConfig(widths=(320, 640, 1280), depths=(0, 2, 10), middle_depth=10, heads=(5, 10, 20), context_width=2048,
                            vector_width=2816, time_width=1280, linear_projections=True),
}  # fmt: skip
# SHA-256 of the lines "name shape" of the U-Nets of the published files, sorted
DIGESTS = {
    "sd15": "8c2cafd295071b39e19613339f72e2cd3530e8317a7ac23263132b5c8cfe52a4",
    "sd21": "b791edc0b2428d1cac407bdd5e9bfa7383c49e3613348c4f7149e637c31b41bf",
    "sdxl_base": "3884182d449c8837466d5c933309621d1b023f396b9b342271ac74525ee79408",
}
DEEP = UNetConfig(widths=(16, 24, 32, 48), depths=(2, 0, 1, 3), middle_depth=3, heads=(2, 3, 4, 6), context_width=20, time_width=40,
                  layers=3, norm_groups=8)  # fmt: skip
CONFIGS = [SD1, SDXL, DEEP, *PUBLISHED.values()]


def original_shapes(config: UNetConfig, *, matrices: bool = False) -> Shapes:
    """As in a single file. ``matrices``: its projections are no convolutions."""
    modules = original_names(config)
    shapes = {}
    for name, shape in expected_shapes(config).items():
        module, _, leaf = name.rpartition(".")
        flat = matrices and module.endswith(("proj_in", "proj_out"))
        shapes[f"{PREFIX}{modules[module]}.{leaf}"] = shape[:2] if flat else shape
    return shapes


def digest(shapes: Shapes) -> str:
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_files(name):
    shapes = original_shapes(PUBLISHED[name], matrices=name == "sd21")
    assert digest(shapes) == DIGESTS[name]
    part = unet_part(MemorySource(shapes), prefix=PREFIX, layout="original")
    assert part.config == PUBLISHED[name]
    assert {piece.key for piece in part.pieces.values()} == set(shapes)


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_files_is_known(name):
    with gzip.open(Path(str(SPECS), "checkpoints", f"{name}.json.gz")) as file:
        tensors = json.load(file)["tensors"]
    shapes = {key: tuple(shape) for key, (_, shape) in tensors.items()}
    part = unet_part(MemorySource(shapes), prefix=PREFIX, layout="original")
    assert part.config == PUBLISHED[name]
    assert {piece.key for piece in part.pieces.values()} == {key for key in shapes if key.startswith(PREFIX)}
    assert digest({key: shape for key, shape in shapes.items() if key.startswith(PREFIX)}) == DIGESTS[name]


@pytest.mark.parametrize("config", CONFIGS)
def test_both_layouts_give_the_same_model(config):
    source = MemorySource(original_shapes(config), config=settings(config))
    original = unet_part(source, prefix=PREFIX, layout="original")
    folder = unet_part(MemorySource(expected_shapes(config), config=settings(config)), prefix="", layout="diffusers")
    assert original.config == folder.config == config
    assert original.pieces.keys() == folder.pieces.keys() == expected_shapes(config).keys()
    assert all(piece.key == name and not piece.change for name, piece in folder.pieces.items())


@pytest.mark.parametrize("config", [SD1, SDXL, replace(PUBLISHED["sdxl_base"], depths=(0, 1, 2), middle_depth=2)])
def test_names_agree_with_those_of_diffusers_converter(config):
    """Which names tensors get is told by numbering them."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    shapes = original_shapes(config)
    settings_of_diffusers = {
        "layers_per_block": config.layers,
        "class_embed_type": None,
        "addition_embed_type": "text_time" if config.vector_width else None,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)],
    }
    converted = single_file.convert_ldm_unet_checkpoint({name: name for name in shapes}, config=settings_of_diffusers)
    pieces = unet_part(MemorySource(shapes, config=settings(config)), prefix=PREFIX, layout="original").pieces
    assert {name: piece.key for name, piece in pieces.items()} == converted


def test_modules_have_the_names_of_loras_of_sdxl():
    names = original_names(PUBLISHED["sdxl_base"])
    assert (
        names["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0"]
        == "input_blocks.4.1.transformer_blocks.1.attn2.to_out.0"
    )
    assert names["mid_block.resnets.1.conv1"] == "middle_block.2.in_layers.2"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["add_embedding.linear_2"] == "label_emb.0.2"
    assert names["up_blocks.2.resnets.0.conv_shortcut"] == "output_blocks.6.0.skip_connection"


@pytest.mark.parametrize("config", CONFIGS)
def test_number_of_blocks(config):
    names = original_names(config)
    blocks = {name.rpartition(".norm1")[0] for name in names if name.endswith(".norm1")}  # each kind has one
    assert config.blocks == len(blocks)


# ---------------------------------------------------------------- projections


@pytest.mark.parametrize(("config", "change"), [(SD1, "convolution"), (SDXL, "matrix")])
def test_projections_may_be_stored_the_other_way(config, change):
    shapes = original_shapes(config)
    other = {}
    for name, shape in shapes.items():
        projection = name.endswith(("proj_in.weight", "proj_out.weight"))
        other[name] = (shape[:2] if len(shape) == 4 else (*shape, 1, 1)) if projection else shape
    part = unet_part(MemorySource(other, config=settings(config)), prefix=PREFIX, layout="original")
    changed = {name for name, piece in part.pieces.items() if piece.change == change}
    assert changed == {name for name in part.pieces if name.endswith(("proj_in.weight", "proj_out.weight"))}
    assert part.config.linear_projections == config.linear_projections


# ---------------------------------------------------------------- what shapes cannot tell


def heads_of(config: UNetConfig, given: dict | None, **source) -> tuple[int, ...]:
    return unet_part(MemorySource(original_shapes(config), config=given, **source), prefix=PREFIX, layout="original").config.heads


def test_heads_are_those_of_the_settings_else_the_published_ones():
    assert heads_of(SD1, {"heads": [1, 2, 4], "norm_groups": 4}) == (1, 2, 4)
    assert heads_of(SD1, {"heads": 4, "norm_groups": 4}) == (4, 4, 4)
    assert heads_of(SD1, {"head_dim": 8, "norm_groups": 4}) == (1, 2, 2)
    assert heads_of(SD1, {"norm_groups": 4}) == (8, 8, 8)
    assert heads_of(SDXL, {"norm_groups": 4}) == (1, 1, 1)
    assert heads_of(PUBLISHED["sd21"], None) == (5, 10, 20, 20)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"heads": [2, 2], "norm_groups": 4}, "heads = .2, 2.; give 3 positive numbers"),
        ({"heads": 0, "norm_groups": 4}, "heads = 0; give a whole number above 0"),
        ({"heads": 3, "norm_groups": 4}, "width 8 cannot be cut into 3 heads"),
        ({"heads": 2}, "width 8 cannot be cut into 32 norm groups"),
    ],
)
def test_settings_that_cannot_be(given, text):
    with pytest.raises(CheckpointError, match=text):
        heads_of(SD1, given)


def test_a_folder_says_heads_and_groups_in_its_config(tmp_path):
    given = {"attention_head_dim": [1, 2, 4], "norm_num_groups": 4}  # diffusers' name for the number of heads
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    part = unet_part(MemorySource(expected_shapes(SD1), path=tmp_path), prefix="", layout="diffusers")
    assert part.config == replace(SD1, heads=(1, 2, 4))
    part = unet_part(MemorySource(expected_shapes(SD1), path=tmp_path / "x.safetensors"), prefix="", layout="diffusers")
    assert part.config.heads == (1, 2, 4)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable as JSON"):
        unet_part(MemorySource(expected_shapes(SD1), path=tmp_path), prefix="", layout="diffusers")


# ---------------------------------------------------------------- files that do not fit


def refused(shapes: Shapes, config: UNetConfig = SD1) -> str:
    with pytest.raises(CheckpointError) as caught:
        unet_part(MemorySource(shapes, config=settings(config)), prefix=PREFIX, layout="original")
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_all_wrong_keys_are_in_one_error():
    shapes = original_shapes(SD1)
    del shapes[f"{PREFIX}out.2.bias"]
    shapes[f"{PREFIX}middle_block.0.in_layers.2.weight"] = (16, 16, 1, 1)
    shapes[f"{PREFIX}extra.weight"] = (3,)
    text = refused(shapes)
    assert f"1 missing: {PREFIX}out.2.bias" in text
    assert f"1 unexpected: {PREFIX}extra.weight" in text
    assert "16x16x1x1 instead of 16x16x3x3" in text
    assert "widths 8, 16, 16" in text


def test_an_inpainting_model_is_named():
    shapes = original_shapes(replace(SD1, in_channels=9))
    assert "takes 9 channels and predicts 4, as inpainting models do" in refused(shapes)


def test_other_tensors_of_the_file_do_not_matter():
    shapes = {**original_shapes(SD1), "first_stage_model.encoder.conv_in.weight": (1,), "model_ema.decay": ()}
    assert unet_part(MemorySource(shapes, config=settings(SD1)), prefix=PREFIX, layout="original").config == SD1


def test_a_file_without_a_unet_is_refused():
    assert "unet has no U-Net: none of its 1 tensors is called model.diffusion_model.input_blocks.*" in refused(
        {"x.weight": (3,)}
    )
    assert "none of its 0 tensors" in refused({})


def test_float8_with_scales_is_told_as_such():
    shapes = {**original_shapes(SD1), f"{PREFIX}middle_block.1.proj_in.scale_weight": ()}
    assert "float8 with scales of its own (model.diffusion_model.middle_block.1.proj_in.scale_weight)" in refused(shapes)
