from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.lumina.checkpoint import build_denoiser, load_denoiser
from library.lumina.layout import NextDitConfig, config_from_shapes, expected_shapes, find_nextdit, nextdit_part, published_axes
from tests.library.lumina.tiny_nextdit import TINY, save_tiny, tiny_weights


def part_of(path: Path, prefix: str | None = None):
    source = open_weights(path, flag="--pretrained_model_name_or_path")
    found = find_nextdit(source.shapes)
    return nextdit_part(source, prefix=prefix if prefix is not None else found or "")


def problem_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        part_of(path)
    return str(caught.value)


def test_published_sizes_are_read_off_the_shapes():
    assert config_from_shapes(expected_shapes(NextDitConfig()), {}) == NextDitConfig()


def test_published_names():
    path = Path(os.environ.get("SPECS_DIR", "specs")) / "checkpoints" / "lumina2.json.gz"
    if not path.is_file():
        pytest.skip("the list of the published file's tensors is not here")
    listed = json.loads(gzip.decompress(path.read_bytes()))["tensors"]
    shapes = {name: tuple(shape) for name, (_, shape) in listed.items() if name != "norm_final.weight"}
    assert shapes == expected_shapes(NextDitConfig())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_tiny_file_is_loaded_with_and_without_prefix(tmp_path, prefix):
    part = part_of(save_tiny(tmp_path / "x.safetensors", prefix=prefix))
    assert part.config == TINY
    denoiser = build_denoiser(part.config)
    load_denoiser(denoiser, part, device="cpu", dtype=torch.float32)
    loaded = denoiser.state_dict()
    assert set(loaded) == set(tiny_weights())  # not norm_final
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tiny_weights().items())


@pytest.mark.parametrize("nested", [True, False])
def test_what_shapes_cannot_tell_comes_from_the_header(tmp_path, nested):
    settings = {"axes_dims": [8, 2, 2], "axes_lens": [30, 40, 50], "norm_eps": 1e-3, "qk_norm_eps": 1e-4, "rope_theta": 100}
    header = json.dumps({"nextdit": settings} if nested else settings)
    config = part_of(save_tiny(tmp_path / "x.safetensors", header=header)).config
    expected = {"axes_dims": (8, 2, 2), "axes_lens": (30, 40, 50), "norm_eps": 1e-3, "qk_norm_eps": 1e-4, "rope_theta": 100}
    assert config == replace(TINY, **expected)


def test_axes_are_equal_where_they_can_be():
    assert published_axes(96) == (32, 32, 32)
    assert published_axes(16) == (8, 4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes_dims": [8, 8]}, "axes_dims = .8, 8.; give 3 whole numbers"),
        ({"axes_dims": [8, 8, 8]}, "8, 8, 8 channels; even numbers whose sum is the head width 12"),
        ({"norm_eps": 0}, "norm_eps = 0; give a positive number"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message):
        part_of(save_tiny(tmp_path / "x.safetensors", header=json.dumps({"nextdit": settings})))


def test_all_wrong_names_are_told_at_once(tmp_path):
    path = save_tiny(
        tmp_path / "x.safetensors",
        layers__0__attention__out__weight=None,
        layers__1__feed_forward__w2__weight=torch.ones(3, 5),
        layers__1__extra=torch.ones(1),
    )
    text = problem_of(path)
    assert "1 missing: layers.0.attention.out.weight" in text
    assert "1 unexpected: layers.1.extra" in text
    assert "layers.1.feed_forward.w2.weight (3x5 instead of 48x64)" in text
    assert "read as 2 blocks of width 48, 4 heads of 12" in text


OTHERS = {
    "a NewBie checkpoint": {"clip_text_pooled_proj.0.weight": torch.ones(1)},
    "a Z-Image checkpoint": {"cap_pad_token": torch.ones(1)},
    "Z-Image (width 3840)": {"x_embedder.weight": torch.ones(3840, 64)},
    "float8 with scales of their own": {"layers.0.attention.qkv.weight_scale": torch.ones(1)},
}


@pytest.mark.parametrize("words", OTHERS)
def test_relatives_are_named(tmp_path, words):
    changes = {name.replace(".", "__"): tensor for name, tensor in OTHERS[words].items()}
    assert words in problem_of(save_tiny(tmp_path / "x.safetensors", **changes))


def test_other_models_are_named(tmp_path, tiny_sd, tiny_anima):
    assert "is a Stable Diffusion 1.x checkpoint (train_network.py trains those)" in problem_of(tiny_sd["sd1"])
    assert "is an Anima DiT (anima_train_network.py trains those)" in problem_of(tiny_anima["dit"])
