from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError
from library.sd3.t5_layout import EMBEDDING, SHARED, T5Config, expected_shapes, t5_part
from tests.library.sd.clip_files import TINY_L, MemorySource, clip_source
from tests.library.sd3.t5_files import TINY_T5, t5_source

ROOT = Path(__file__).resolve().parents[3]
BUNDLED = "text_encoders.t5xxl.transformer."


def test_torch_is_not_needed():
    code = "import sys, library.sd3.t5_layout, library.sd3.tokenizers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("prefix", ["", BUNDLED])
@pytest.mark.parametrize("embedding", [SHARED, EMBEDDING])
def test_sizes_and_names_come_from_the_tensors(prefix, embedding):
    source = t5_source(prefix=prefix, embedding=embedding)
    beside = {} if prefix == "" else {"text_encoders.clip_l.transformer.x": torch.zeros(1)}
    part = t5_part(dataclasses.replace(source, held={**source.held, **beside}), prefix=prefix)
    assert part.config == TINY_T5
    assert part.pieces.keys() == expected_shapes(TINY_T5).keys() and part.pieces[EMBEDDING].key == prefix + embedding
    assert {piece.key for piece in part.pieces.values()} == source.shapes.keys()


def test_both_names_of_the_embedding_and_what_else_files_hold():
    source = t5_source()
    more = {EMBEDDING: source.held[SHARED], "lm_head.weight": torch.zeros(2), "decoder.final_layer_norm.weight": torch.zeros(3)}
    part = t5_part(dataclasses.replace(source, held={**source.held, **more, "logit_scale": torch.zeros(())}), prefix="")
    assert part.config == TINY_T5 and part.pieces[EMBEDDING].key == EMBEDDING


def test_the_published_names_and_sizes():
    path = Path(os.environ.get("SPECS_DIR", "specs")) / "checkpoints" / "t5xxl.json.gz"
    if not path.is_file():
        pytest.skip("the published names are not here")
    published = {name: tuple(shape) for name, (_, shape) in json.loads(gzip.decompress(path.read_bytes()))["tensors"].items()}
    assert published.pop(SHARED) == published[EMBEDDING]
    assert published == expected_shapes(T5Config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder.block.1.layer.1.DenseReluDense.wo.weight": None},
            r"1 missing: encoder\.block\.1\.layer\.1\.DenseReluDense\.wo",
        ),
        ({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (32, 3)}, "1 unexpected"),  # UMT5's
        ({"encoder.block.1.layer.0.layer_norm.weight": (25,)}, r"of another shape: .*25 instead of 24"),
        ({SHARED: (32, 24)}, "knows 32 tokens"),
        ({SHARED: (256384, 24)}, "knows 256,384 tokens"),
        ({SHARED: None}, r"1 missing: shared\.weight"),
        ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (30, 3)}, "30 buckets"),
        ({"encoder.block.1.layer.1.DenseReluDense.wo.scale_weight": ()}, "float8 with scales of their own"),
    ],
)
def test_files_that_do_not_fit(changes, message):
    held = {**t5_source().held, **{name: None if shape is None else torch.zeros(shape) for name, shape in changes.items()}}
    source = MemorySource({name: tensor for name, tensor in held.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=message):
        t5_part(source, prefix="")


def test_another_models_file_is_named():
    with pytest.raises(CheckpointError, match=r"has no T5 text encoder: .* encoder\.block\.0 .*; it is a CLIP text encoder"):
        t5_part(clip_source(TINY_L, "hf"), prefix="")
    with pytest.raises(CheckpointError, match=r"has no T5 text encoder: no tensor is called text_encoders\.t5xxl"):
        t5_part(MemorySource({"x": torch.zeros(1)}), prefix=BUNDLED)
