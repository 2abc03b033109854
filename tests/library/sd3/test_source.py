from __future__ import annotations

import pytest

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.sd3.source import CLIP_L, clip_encoder, t5_encoder


@pytest.fixture
def with_a_level(tiny_sd3, tmp_path):
    """Files of one encoder whose names begin with ``transformer.``, as some tools write them."""

    def write(name: str):
        source = open_weights(tiny_sd3[name], flag="--x")
        held = {f"transformer.{key}": tensor for key, tensor in source.tensors(source.shapes)}
        save_safetensors(tmp_path / f"{name}.safetensors", held, dict(source.metadata))
        return str(tmp_path / f"{name}.safetensors")

    return write


def test_an_encoder_one_level_down(tiny_sd3, with_a_level):
    clip, plain = clip_encoder(CLIP_L, with_a_level("clip_l"), None), clip_encoder(CLIP_L, str(tiny_sd3["clip_l"]), None)
    assert clip.config == plain.config and all(piece.key.startswith("transformer.") for piece in clip.pieces.values())
    assert t5_encoder(with_a_level("t5xxl"), None).config == t5_encoder(str(tiny_sd3["t5xxl"]), None).config


def test_another_encoder_one_level_down_is_named(with_a_level):
    with pytest.raises(CheckpointError, match="--clip_l .*t5xxl.safetensors is a T5 text encoder, not a CLIP-L text encoder"):
        clip_encoder(CLIP_L, with_a_level("t5xxl"), None)
    with pytest.raises(CheckpointError, match="--t5xxl .*clip_l.safetensors is a CLIP text encoder, not a T5-XXL text encoder"):
        t5_encoder(with_a_level("clip_l"), None)
