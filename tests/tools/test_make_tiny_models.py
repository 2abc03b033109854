"""Tiny checkpoints: the published layout, equal bytes for equal arguments, live weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors
from tools.make_tiny_models import make_anima
from tools.tiny_anima import QWEN_VOCABULARY, SIZES, T5_VOCABULARY, dit_tensors

ROOT = Path(__file__).resolve().parents[2]


def tensors(path):
    return dict(read_tensors(read_header(path)))


def test_files_and_headers(tiny_anima):
    assert {role: path.name for role, path in tiny_anima.items()} == {
        "dit": "anima_tiny.safetensors",
        "qwen3": "qwen3_tiny.safetensors",
        "vae": "qwen_image_vae_tiny.safetensors",
        "qwen3_folder": "qwen3_tiny",
    }
    for role in ("dit", "qwen3", "vae"):
        header = read_header(tiny_anima[role])
        assert header.metadata == {"format": "pt"}
        assert {info.dtype for info in header.tensors.values()} == {"BF16"}
        assert tiny_anima[role].stat().st_size < 12e6


def test_sizes_read_as_meant(tiny_anima):
    sizes = SIZES["tiny"]
    dit, qwen = read_header(tiny_anima["dit"]).tensors, read_header(tiny_anima["qwen3"]).tensors
    assert dit["net.x_embedder.proj.1.weight"].shape == (sizes.width, 68)
    assert dit["net.blocks.0.self_attn.q_norm.weight"].shape == (sizes.width // sizes.heads,)
    assert dit["net.llm_adapter.embed.weight"].shape == (T5_VOCABULARY, sizes.context)
    assert qwen["model.embed_tokens.weight"].shape == (QWEN_VOCABULARY, sizes.context)
    assert sum(name.startswith("net.blocks.") and name.endswith("mlp.layer1.weight") for name in dit) == sizes.blocks


@pytest.mark.parametrize("role", ["dit", "vae"])
def test_equal_arguments_give_equal_bytes_and_another_seed_others(tiny_anima, tmp_path, role):
    again = make_anima(tmp_path / "again")
    assert again[role].read_bytes() == tiny_anima[role].read_bytes()
    assert make_anima(tmp_path / "other", seed=1)[role].read_bytes() != tiny_anima[role].read_bytes()


def test_no_weight_is_dead(tiny_anima):
    for role in ("dit", "qwen3", "vae"):
        for name, tensor in tensors(tiny_anima[role]).items():
            assert tensor.isfinite().all() and tensor.float().abs().max() > 0, name


def test_float32_holds_the_same_values(tmp_path):
    path = make_anima(tmp_path, dtype="fp32")["dit"]
    expected = dit_tensors(SIZES["tiny"], seed=0)
    written = tensors(path)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_the_folder_is_a_hugging_face_model(tiny_anima):
    from transformers import Qwen3Model

    config = json.loads((tiny_anima["qwen3_folder"] / "config.json").read_text())
    assert config["num_hidden_layers"] == SIZES["tiny"].qwen_layers
    model = Qwen3Model.from_pretrained(tiny_anima["qwen3_folder"]).float()
    states = model(torch.tensor([[64, 8251, 151643]])).last_hidden_state
    assert states.shape == (1, 3, SIZES["tiny"].context)
    assert 0.3 < states.std().item() < 3


def test_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "make_tiny_models.py"), str(tmp_path / "out"), "--seed", "3"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "anima_tiny.safetensors" in answer.stdout and len(list((tmp_path / "out").iterdir())) == 3


def test_an_unwritable_folder_is_an_error_block(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(ROOT / "tools" / "make_tiny_models.py"), str(tmp_path / "file" / "anima_tiny.safetensors")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode != 0 and "error" in answer.stderr.lower()
