from __future__ import annotations

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.files.weights_source import module_tensors
from library.sd.clip_layout import ClipConfig, clip_part, clip_skip_problem, expected_shapes
from tests.library.sd.clip_files import TINY_G, TINY_L, MemorySource, clip_source, clip_tensors

SPECS = os.environ.get("SPECS_DIR")
L_PREFIX, G_PREFIX = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.mark.parametrize(("config", "layout", "prefix"), [(TINY_L, "hf", L_PREFIX), (TINY_G, "open_clip", G_PREFIX)])
def test_every_tensor_finds_its_place(config, layout, prefix):
    part = clip_part(clip_source(config, layout, prefix=prefix), prefix=prefix, layout=layout, keep_layers=None)
    assert part.config == config
    loaded = dict(module_tensors(part.source, part.pieces))
    expected = clip_tensors(config)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_open_clip_keeps_the_projection_as_a_matrix_for_the_right():
    source = clip_source(TINY_G, "open_clip", prefix=G_PREFIX)
    assert tuple(source.held[G_PREFIX + "text_projection"].shape) == (24, 20)  # x (24) @ P -> 20


@pytest.mark.parametrize("layout", ["hf", "open_clip"])
@pytest.mark.parametrize("name", ["text_projection", "text_projection.weight"])
def test_the_name_tells_whether_the_projection_is_a_matrix_or_a_linear(layout, name):
    source = clip_source(TINY_G, layout)
    weight = clip_tensors(TINY_G)["text_projection.weight"]
    held = {key: tensor for key, tensor in source.held.items() if not key.startswith("text_projection")}
    held[name] = weight if name.endswith("weight") else weight.t().contiguous()
    part = clip_part(dataclasses.replace(source, held=held), prefix="", layout=layout, keep_layers=None)
    assert torch.equal(dict(module_tensors(part.source, part.pieces))["text_projection.weight"], weight)


def test_names_without_the_text_model_level(tmp_path):
    source = clip_source(TINY_L, "hf")
    held = {name.removeprefix("text_model."): tensor.contiguous() for name, tensor in source.held.items()}
    save_safetensors(tmp_path / "model.safetensors", held, dict(source.metadata))
    part = clip_part(open_weights(tmp_path / "model.safetensors", flag="--x"), prefix="", layout="hf", keep_layers=None)
    assert part.config == TINY_L
    assert dict(module_tensors(part.source, part.pieces)).keys() == clip_tensors(TINY_L).keys()


def test_the_last_layer_can_be_left_in_the_file():
    part = clip_part(clip_source(TINY_G, "open_clip"), prefix="", layout="open_clip", keep_layers=-1)
    assert part.config == dataclasses.replace(TINY_G, layers=3, projection=None)
    assert not any("resblocks.3" in piece.key or "projection" in piece.key for piece in part.pieces.values())


@pytest.mark.parametrize(("in_file", "asked", "kept"), [(4, 2, 2), (4, None, 4), (4, -1, 3), (4, 9, 4)])
def test_layers_that_are_kept(in_file, asked, kept):
    config = dataclasses.replace(TINY_L, layers=in_file)
    assert clip_part(clip_source(config, "hf"), prefix="", layout="hf", keep_layers=asked).config.layers == kept


def test_what_does_not_belong_to_the_encoder_is_passed_over():
    source = clip_source(TINY_L, "hf", prefix=L_PREFIX)
    names = ("text_model.embeddings.position_ids", "logit_scale", "vision_model.encoder.layers.0.mlp.fc1.weight")
    more = {L_PREFIX + name: torch.zeros(1, 77) for name in names}
    source = dataclasses.replace(source, held={**source.held, **more, "first_stage_model.x": torch.zeros(1)})
    assert clip_part(source, prefix=L_PREFIX, layout="hf", keep_layers=None).config == TINY_L


def test_all_wrong_names_are_told_together():
    source = clip_source(TINY_L, "hf", prefix=L_PREFIX)
    held = dict(source.held)
    del held[L_PREFIX + "text_model.final_layer_norm.bias"]
    held[L_PREFIX + "text_model.encoder.layers.0.extra"] = torch.zeros(1)
    held[L_PREFIX + "text_model.encoder.layers.1.mlp.fc2.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        clip_part(dataclasses.replace(source, held=held), prefix=L_PREFIX, layout="hf", keep_layers=None)
    text = str(caught.value)
    assert "model.safetensors" in text and "1 missing: " + L_PREFIX + "text_model.final_layer_norm.bias" in text
    assert "1 unexpected" in text and "5 instead of 16" in text


@pytest.mark.parametrize(("change", "message"), [
    ({"width": 18, "heads": 4}, "needs heads"),
    ({"positions": 32}, "32 tokens"),
    ({"vocabulary": 1000}, "1,000 tokens"),
])  # fmt: skip
def test_sizes_that_cannot_be(change, message):
    config = dataclasses.replace(TINY_L, **change)
    with pytest.raises(CheckpointError, match=message):
        clip_part(clip_source(config, "hf"), prefix="", layout="hf", keep_layers=None)


def test_a_file_without_the_encoder_and_one_with_scales():
    with pytest.raises(CheckpointError, match=r"no text encoder.*encoder\.layers\.0"):
        clip_part(MemorySource({"x": torch.zeros(1)}), prefix="", layout="hf", keep_layers=None)
    source = clip_source(TINY_L, "hf")
    held = {**source.held, "text_model.encoder.layers.0.mlp.fc1.scale_weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="float8 with scales"):
        clip_part(dataclasses.replace(source, held=held), prefix="", layout="hf", keep_layers=None)


@pytest.mark.parametrize(
    ("settings", "message"), [({"heads": "3"}, "heads = '3'"), ({"activation": "relu"}, "activation = 'relu'")]
)
def test_settings_that_are_not_understood(settings, message):
    source = dataclasses.replace(clip_source(TINY_L, "hf"), metadata={"config": json.dumps({"text": [settings]})})
    with pytest.raises(CheckpointError, match=message):
        clip_part(source, prefix="", layout="hf", keep_layers=None)


@pytest.mark.parametrize(
    ("prefix", "config"),
    [
        ("text_encoders.clip_l.transformer.", {"clip_l": {"heads": 4, "activation": "gelu"}, "clip_g": {"heads": 1}}),
        ("", {"heads": 4, "activation": "gelu"}),
        ("transformer.", {"heads": 4, "activation": "gelu"}),
    ],
)
def test_settings_of_files_for_sd3(prefix, config):
    source = dataclasses.replace(clip_source(TINY_L, "hf", prefix=prefix), metadata={"config": json.dumps(config)})
    found = clip_part(source, prefix=prefix, layout="hf").config
    assert (found.heads, found.activation) == (4, "gelu")


def test_another_models_file_is_named():
    held = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="no text encoder.*; it is a T5 text encoder"):
        clip_part(MemorySource(held), prefix="", layout="hf")


def test_settings_of_a_folder(tmp_path):
    source = clip_source(TINY_L, "hf")
    save_safetensors(tmp_path / "model.safetensors", dict(source.held), {})
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_act": "gelu"}))
    weights = open_weights(tmp_path / "model.safetensors", flag="--x")
    config = clip_part(weights, prefix="", layout="hf", keep_layers=None).config
    assert (config.heads, config.activation) == (4, "gelu")


def test_the_published_sizes_are_the_defaults():
    assert expected_shapes(ClipConfig())["text_model.encoder.layers.11.mlp.fc1.weight"] == (3072, 768)


@pytest.mark.parametrize(("clip_skip", "allowed"), [(None, True), (1, True), (12, True), (0, False), (13, False)])
def test_clip_skip_is_within_the_layers(clip_skip, allowed):
    problem = clip_skip_problem(clip_skip, 12)
    assert (problem is None) == allowed and (allowed or "--clip_skip" in problem)


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
@pytest.mark.parametrize(("name", "prefix", "layout", "keep", "expected"), [
    ("sd15", "cond_stage_model.transformer.", "hf", None, ClipConfig()),
    ("sd21", "cond_stage_model.model.", "open_clip", -1,
     ClipConfig(width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu")),
    ("sdxl_base", L_PREFIX, "hf", None, ClipConfig()),
    ("sdxl_base", G_PREFIX, "open_clip", None,
     ClipConfig(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection=1280)),
])  # fmt: skip
def test_published_checkpoints(name, prefix, layout, keep, expected):
    tensors = json.loads(gzip.decompress((Path(SPECS) / f"checkpoints/{name}.json.gz").read_bytes()))["tensors"]
    source = MemorySource({key: torch.empty(shape, device="meta") for key, (_, shape) in tensors.items()})
    part = clip_part(source, prefix=prefix, layout=layout, keep_layers=keep)
    assert part.config == expected
    of_encoders = {key for key in tensors if key.startswith(prefix)}
    unused = of_encoders - {piece.key for piece in part.pieces.values()}
    assert all(key.endswith(("position_ids", "logit_scale")) or ".23." in key or keep and "projection" in key for key in unused)
