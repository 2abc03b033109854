"""What is read off the names and shapes of an MMDiT."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.sd3.checkpoint import build_denoiser
from library.sd3.layout import MmditConfig, expected_shapes, mmdit_part, mmdit_prefix, position_problem
from tests.library.sd3.tiny_mmdit import KINDS, TINY, save_tiny, tiny_weights

SPECS = Path(os.environ.get("SPECS_DIR") or "no folder")
PUBLISHED = {
    "sd3_medium": MmditConfig(),
    "sd35_medium": MmditConfig(position_side=384, qk_norm=True, dual_blocks=tuple(range(13))),
    "sd35_large": MmditConfig(width=2432, blocks=38, heads=38, mlp_hidden=9728, qk_norm=True),
}


def part_of(shapes, **header: str):
    return mmdit_part(SimpleNamespace(path="model", shapes=shapes, metadata=header), prefix=mmdit_prefix(shapes) or "")


def problem_of(shapes, **header: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        part_of(shapes, **header)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name):
    path = SPECS / "checkpoints" / f"{name}.json.gz"
    if not path.is_file():
        pytest.skip("SPECS_DIR names no folder with lists of checkpoints")
    tensors = json.loads(gzip.decompress(path.read_bytes()))["tensors"]
    part = part_of({key: tuple(value[1]) for key, value in tensors.items()})
    assert part.config == PUBLISHED[name]
    assert len(part.pieces) == sum(key.startswith("model.diffusion_model.") for key in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_the_module(kind):
    config = KINDS[kind]
    assert config.kind == kind
    assert {name: tuple(tensor.shape) for name, tensor in build_denoiser(config).state_dict().items()} == expected_shapes(config)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_prefixes(prefix, tmp_path):
    path = save_tiny(tmp_path / "model.safetensors", prefix=prefix)
    source = open_weights(path, flag="--model")
    assert mmdit_prefix(source.shapes) == prefix
    assert mmdit_part(source, prefix=prefix).config == TINY


def test_heads_come_from_the_norms_else_from_the_header():
    plain = KINDS["medium"]
    shapes = expected_shapes(plain)
    assert part_of(shapes).config == plain  # width / 64
    for config in ({"mmdit": {"heads": 4}}, {"heads": 4}):
        assert part_of(shapes, config=json.dumps(config)).config == replace(plain, heads=4)
    assert part_of(expected_shapes(TINY), config=json.dumps({"mmdit": {"heads": 16}})).config.heads == 2
    assert "cannot be cut into 3 heads: its config needs heads" in problem_of(shapes, config=json.dumps({"heads": 3}))
    assert "heads = 0" in problem_of(shapes, config=json.dumps({"heads": 0}))


def test_what_is_missing_or_misshapen_is_listed():
    shapes = expected_shapes(TINY)
    del shapes["joint_blocks.1.x_block.mlp.fc1.weight"]
    shapes["joint_blocks.1.x_block.mlp.fc3.weight"] = (1,)
    shapes["final_layer.linear.bias"] = (3,)
    problem = problem_of(shapes)
    assert "1 missing: joint_blocks.1.x_block.mlp.fc1.weight" in problem and "1 unexpected: joint_blocks.1" in problem
    assert "final_layer.linear.bias (3 instead of 64)" in problem and "read as 3 blocks of width 64, 2 heads" in problem
    assert "has no MMDiT" in problem_of({"a": (1,)})


def test_float8_with_scales_of_its_own_is_refused():
    shapes = expected_shapes(TINY) | {"joint_blocks.0.x_block.mlp.fc1.scale_weight": ()}
    assert "float8 with scales of their own" in problem_of(shapes)


def test_other_parts_beside_a_denoiser_without_a_prefix_are_left_out(tmp_path):
    extra = {"first_stage_model.decoder.conv_in.bias": torch.zeros(1), "text_encoders.clip_l.logit_scale": torch.zeros(())}
    save_safetensors(tmp_path / "model.safetensors", {**tiny_weights(), **extra})
    source = open_weights(tmp_path / "model.safetensors", flag="--model")
    assert mmdit_part(source, prefix="").config == TINY


@pytest.mark.parametrize(("rows", "columns", "fits"), [(12, 12, True), (1, 12, True), (13, 4, False), (4, 13, False)])
def test_sizes_that_have_positions(rows, columns, fits):
    assert (position_problem(TINY, rows, columns) is None) == fits
