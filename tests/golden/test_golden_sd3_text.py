"""SD3's text side: token ids and masks, states with masks off and on, pooled vectors, dropped encoders, the joined context."""

from __future__ import annotations

import json

import pytest
import torch

from library.sd.clip_layout import clip_part
from library.sd3.layout import Sd3TextParts
from library.sd3.t5_layout import t5_part
from library.sd3.text import Sd3Conditioning, Sd3TextEncoder, build_text_encoder, load_text_encoder
from library.sd3.tokenizers import load_sd3_tokenizers
from library.sdxl.text import end_of
from tests.golden.golden_files import Golden, load_golden, relative_error
from tests.library.sd.clip_files import MemorySource

FILE = "sd3/sd3_text.safetensors"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden(FILE)


@pytest.fixture(scope="module")
def parts(golden) -> Sd3TextParts:
    about = golden.about["config"]
    config = {name: {"heads": about[name]["heads"], "activation": about[name]["act"]} for name in ("clip_l", "clip_g")}
    source = MemorySource({name: tensor.float() for name, tensor in golden.weights.items()}, {"config": json.dumps(config)})
    clips = (clip_part(source, prefix=f"text_encoders.{name}.transformer.", layout="hf") for name in ("clip_l", "clip_g"))
    found = Sd3TextParts(clip_l=next(clips), clip_g=next(clips), t5=t5_part(source, prefix="text_encoders.t5xxl.transformer."))
    assert found.clip_g.config.layers == about["clip_g"]["layers"] and found.clip_l.config.projection is None
    t5 = found.t5.config
    assert (t5.width, t5.mlp_width, t5.heads, t5.head_dim, t5.layers) == (64, 96, 4, 16, 6)
    assert t5.buckets == about["t5"]["relative_buckets"] and t5.max_distance == about["t5"]["relative_max_distance"]
    return found


def loaded(golden: Golden, parts: Sd3TextParts, *, masked: bool) -> Sd3TextEncoder:
    tokens = golden.about["config"]["max_t5_tokens"]
    encoder = build_text_encoder(parts, t5_tokens=tokens, mask_clip=masked, mask_t5=masked)
    load_text_encoder(encoder, parts)
    return encoder


@pytest.fixture(scope="module")
def plain(golden, parts) -> Sd3Conditioning:
    with torch.no_grad():
        return loaded(golden, parts, masked=False).encode(golden.about["captions"])


def test_token_ids_and_masks(golden):
    tokenizers = load_sd3_tokenizers(t5_tokens=golden.about["config"]["max_t5_tokens"])
    captions = golden.about["captions"]
    for name in ("l", "g"):
        rows = [getattr(tokenizers, f"clip_{name}").rows(caption).ids[0] for caption in captions]
        assert rows == golden.inputs[f"{name}_ids"].tolist()
        assert [end_of(row) + 1 for row in rows] == golden.inputs[f"{name}_mask"].sum(1).tolist()
    rows = [tokenizers.t5.row(caption) for caption in captions]
    assert [row.ids for row in rows] == golden.inputs["t5_ids"].tolist()
    assert [row.used for row in rows] == golden.inputs["t5_mask"].sum(1).tolist()


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_states_and_pooled_vectors(golden, parts, masked):
    start = f"lgmask{masked:d}_t5mask{masked:d}"
    found = loaded(golden, parts, masked=masked).encode(golden.about["captions"])
    expected = golden.outputs[f"{start}/lg_out"].split([24, 40], dim=-1)
    assert relative_error(found.l_states, expected[0]) < 1e-4
    assert relative_error(found.g_states, expected[1]) < 1e-4
    assert relative_error(found.t5_states, golden.outputs[f"{start}/t5_out"]) < 1e-4
    assert relative_error(found.pooled, golden.outputs[f"{start}/lg_pooled"]) < 1e-4


def test_the_joined_context(golden, plain):
    context = plain.context(64)
    assert list(context.shape) == golden.about["context_shape_with_t5"]
    assert relative_error(context[:, 70:84], golden.outputs["context_with_t5_rows_70_84"]) < 1e-4
    assert torch.equal(context[:, :77, :24], plain.l_states)
    without = Sd3Conditioning(plain.l_states, plain.g_states, plain.t5_states[:, :0], plain.l_pooled, plain.g_pooled)
    assert list(without.context(64).shape) == golden.about["context_shape_without_t5"]
    assert torch.equal(without.context(64)[:, :77], context[:, :77]) and not without.context(64)[:, 77:].any()


@pytest.mark.parametrize("case", range(3))
def test_dropped_encoders(golden, plain, case):
    about = golden.about["dropout_cases"][case]
    drops = {name: torch.tensor(about[f"dropped_{name}"]) for name in ("l", "g", "t5")}
    found = plain.dropped(**drops)
    assert relative_error(found.pooled, golden.outputs[f"drop{case}/lg_pooled"]) < 1e-4
    for name, drop in drops.items():
        states, before = getattr(found, f"{name}_states"), getattr(plain, f"{name}_states")
        assert not states[drop].any() and torch.equal(states[~drop], before[~drop])
