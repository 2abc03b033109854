from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.lumina.gemma_layout import GemmaConfig, expected_shapes, find_gemma, gemma_part
from tests.library.lumina.gemma_files import gemma_tensors, renamed, written
from tools.tiny_lumina import sizes

TINY = sizes("tiny").gemma2
BUNDLE = "text_encoders.gemma2_2b.transformer.model."


def opened(path: Path):
    return open_weights(path, flag="--gemma2")


@pytest.mark.parametrize("module", ["gemma_layout", "tokenizer", "system_prompt"])
def test_needs_no_torch(module):
    code = f"import sys, library.lumina.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("role", ["gemma2", "gemma2_folder", "whole"])
def test_every_file_gives_the_same_encoder(tiny_lumina, role):
    source = opened(tiny_lumina[role])
    part = gemma_part(source)
    assert part.config == TINY
    prefix = BUNDLE if role == "whole" else "model."
    assert find_gemma(source.shapes) == prefix
    assert {name: source.shapes[piece.key] for name, piece in part.pieces.items()} == {
        name: shape for name, shape in expected_shapes(TINY).items() if name != "norm.weight" and not name.startswith("layers.2.")
    }
    assert all(piece.key == prefix + name for name, piece in part.pieces.items())


@pytest.mark.parametrize("prefix", ["", "model.", BUNDLE, "cond_stage_model.gemma."])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_order_of_names_does_not_matter(tiny_lumina, tmp_path, prefix, is_reversed):
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    tensors = renamed(tensors, lambda name: prefix + name.removeprefix("model.") if name != "spiece_model" else name)
    tensors["lm_head.weight"] = torch.zeros(TINY.vocabulary, TINY.width)
    tensors["logit_scale"] = torch.zeros(())
    source = written(tmp_path / "gemma.safetensors", tensors, like=tiny_lumina["gemma2"])
    if is_reversed:
        object.__setattr__(source, "shapes", dict(reversed(source.shapes.items())))
    part = gemma_part(source)
    assert part.config == TINY and part.pieces["embed_tokens.weight"].key == f"{prefix}embed_tokens.weight"


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[int, ...]]:
    path = Path(os.environ.get("SPECS_DIR", "specs")) / "checkpoints" / "gemma2_2b.json.gz"
    if not path.is_file():
        pytest.skip("the list of published names is not here")
    return {name: tuple(shape) for name, (_, shape) in json.loads(gzip.decompress(path.read_bytes()))["tensors"].items()}


def test_published_file_fits(published):
    shapes = published
    part = gemma_part(ListedNames(shapes))
    assert part.config == GemmaConfig() and part.config.used_blocks == 25
    unused = {name for name in shapes if name.startswith("model.layers.25.")} | {"model.norm.weight", "spiece_model"}
    assert {piece.key for piece in part.pieces.values()} == set(shapes) - unused


def test_what_is_not_used_may_be_left_out(published):
    whole = gemma_part(ListedNames(published))
    shapes = {name: shape for name, shape in published.items() if not name.startswith("model.layers.25.")}
    for lacking in ([], ["model.norm.weight"]):
        part = gemma_part(ListedNames({name: shape for name, shape in shapes.items() if name not in lacking}))
        assert part.config == whole.config and part.pieces == whole.pieces
    with pytest.raises(CheckpointError, match="1 missing: layers.3.mlp.up_proj.weight"):
        gemma_part(ListedNames({name: shape for name, shape in shapes.items() if "layers.3.mlp.up_proj" not in name}))


@pytest.mark.parametrize("layers", [24, 27])
def test_another_number_of_layers_is_refused(published, layers):
    """24: the last two are missing, so that one layer too few would be run."""
    of_one = {name: shape for name, shape in published.items() if name.startswith("model.layers.0.")}
    shapes = {name: shape for name, shape in published.items() if ".layers." not in name}
    shapes |= {name.replace(".0.", f".{i}."): shape for i in range(layers) for name, shape in of_one.items()}
    with pytest.raises(CheckpointError, match=f"not a complete Gemma 2 .*it has {layers} layers, where 26 are wanted"):
        gemma_part(ListedNames(shapes))


class ListedNames:
    """A source of names and shapes alone."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes, self.path, self.metadata = shapes, Path("gemma.safetensors"), {}

    def tensors(self, names):
        raise AssertionError("only looked at")


def test_a_folders_config_says_what_shapes_cannot(tiny_lumina, tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(tiny_lumina["gemma2_folder"], folder)
    config = json.loads((folder / "config.json").read_text())

    def config_with(**values):
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        return gemma_part(opened(folder)).config

    changed = {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 30.0, "rms_norm_eps": 1e-5, "rope_theta": 500.0}
    expected = replace(TINY, query_scalar=4, softcap=30.0, norm_eps=1e-5, rope_theta=500.0)
    assert config_with(**changed) == expected
    assert config_with(rope_theta=None, rope_parameters={"rope_theta": 7.0}).rope_theta == 7.0
    with pytest.raises(CheckpointError, match="attn_logit_softcapping = 0; give a positive number"):
        config_with(attn_logit_softcapping=0)
    assert config_with(num_hidden_layers=4) == replace(TINY, blocks=4)  # the file lacks the layer that is not used
    for blocks in (2, 5):
        with pytest.raises(CheckpointError, match=f"it has 3 layers, where {blocks} are wanted"):
            config_with(num_hidden_layers=blocks)
    with pytest.raises(CheckpointError, match="holds a 'gemma' model by its config.json, not a Gemma 2"):
        config_with(model_type="gemma")


def test_a_file_of_one_model_may_say_it_without_a_name(tiny_lumina, tmp_path):
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    save_safetensors(tmp_path / "gemma.safetensors", tensors, {"config": json.dumps({"heads": 2})})
    config = gemma_part(opened(tmp_path / "gemma.safetensors")).config
    assert (config.heads, config.key_heads, config.head_dim) == (2, 1, 32)
    save_safetensors(tmp_path / "gemma.safetensors", tensors)  # nothing said: Gemma's 256 channels a head, or all there are
    with pytest.raises(CheckpointError, match="of another shape.*1 heads of 64"):
        gemma_part(opened(tmp_path / "gemma.safetensors"))


def test_wrong_names_are_listed_together(tiny_lumina, tmp_path):
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.2.mlp.gate_proj.weight"] = torch.zeros(5, 32)
    with pytest.raises(CheckpointError) as error:
        gemma_part(written(tmp_path / "gemma.safetensors", tensors, like=tiny_lumina["gemma2"]))
    (text,) = error.value.problems
    assert "is not a complete Gemma 2 text encoder" in text and "3 layers of width 32" in text
    for part in (
        "1 missing: layers.1.mlp.up_proj.weight",
        "q_proj.bias",
        "layers.2.mlp.gate_proj.weight (5x32 instead of 128x32)",
    ):
        assert part in text


def test_a_file_without_the_layer_that_is_not_used_is_damaged_too(tiny_lumina, tmp_path):
    tensors = {name: tensor for name, tensor in gemma_tensors(tiny_lumina["gemma2"]).items() if ".layers.2.mlp" not in name}
    with pytest.raises(CheckpointError, match="3 missing: layers.2.mlp"):
        gemma_part(written(tmp_path / "gemma.safetensors", tensors, like=tiny_lumina["gemma2"]))


def test_float8_with_scales_is_refused(tiny_lumina, tmp_path):
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    tensors["model.layers.0.mlp.up_proj.scale_weight"] = torch.ones(())
    with pytest.raises(CheckpointError, match="float8 with scales of their own"):
        gemma_part(written(tmp_path / "gemma.safetensors", tensors, like=tiny_lumina["gemma2"]))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.weight"], "is a Qwen3 text encoder"),
        (["model.layers.0.self_attn.q_proj.weight"], "is a language model of another family"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "is a T5 text encoder"),
        (["cap_embedder.0.weight", "context_refiner.0.ffn_norm1.weight"], "is a Lumina Image 2.0 checkpoint"),
        (
            ["model.layers.0.pre_feedforward_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"],
            "is a Gemma 3 text encoder",
        ),
        (["weight"], "is a file without any name of Gemma 2's"),
    ],
)
def test_another_model_is_named(tmp_path, names, what):
    save_safetensors(tmp_path / "other.safetensors", {name: torch.zeros(4) for name in names})
    with pytest.raises(CheckpointError, match=f"other.safetensors {what}.*give Gemma 2 2B"):
        gemma_part(opened(tmp_path / "other.safetensors"))
