from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.anima.vae_layout import LATENTS_MEAN, LATENTS_STD, VaeConfig, expected_shapes, read_vae_layout
from library.errors import CheckpointError
from library.files.safetensors_file import save_safetensors
from tests.library.anima.tiny_vae import SIZES, save_tiny_vae, tiny_vae_weights

ROOT = Path(__file__).resolve().parents[3]


def test_needs_no_torch():
    code = "import sys, library.anima.vae_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_sizes_and_names_of_the_published_layout(tmp_path):
    layout = read_vae_layout(save_tiny_vae(tmp_path / "vae.safetensors"))
    assert layout.config == VaeConfig(*SIZES, LATENTS_MEAN, LATENTS_STD)
    assert layout.config.stride == 8
    assert layout.names["encoder.downsamples.4.shortcut.weight"] == "encoder.blocks.4.shortcut.weight"
    assert layout.names["decoder.upsamples.2.resample.1.bias"] == "decoder.blocks.2.conv.bias"
    assert sorted(layout.names.values()) == sorted(expected_shapes(*SIZES))


def test_published_sizes_have_the_published_number_of_parameters():
    # the published file counts 126,892,531 with three time slices and the time convolutions
    shapes = expected_shapes(96, (96, 192, 384, 384), 2, 16)
    assert len(shapes) == 194 - 8  # four time_conv modules, weight and bias
    assert shapes["decoder.blocks.4.conv1.weight"] == (384, 192, 3, 3)
    assert shapes["decoder.blocks.11.conv.weight"] == (96, 192, 3, 3)


def test_wrong_keys_are_listed_together_under_names_of_the_file(tmp_path):
    path = save_tiny_vae(
        tmp_path / "vae.safetensors",
        conv1__bias=None,
        encoder__head__2__bias=torch.zeros(7),
        decoder__extra__weight=torch.zeros(3),
    )
    with pytest.raises(CheckpointError) as caught:
        read_vae_layout(path)
    text = str(caught.value)
    assert "1 missing: quant_conv.bias" in text
    assert "1 unexpected: decoder.extra.weight" in text
    assert "encoder.head.2.bias (7 instead of 32)" in text


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.pth"])
def test_no_such_file_names_the_near_one(tmp_path, name):
    save_tiny_vae(tmp_path / "qwen_image_vae.safetensors")
    with pytest.raises(CheckpointError, match="--vae .*does not exist"):
        read_vae_layout(tmp_path / name)
    with pytest.raises(CheckpointError, match="did you mean qwen_image_vae.safetensors"):
        read_vae_layout(tmp_path / "qwen_image_va.safetensors")


def test_another_architecture_is_named(tmp_path):
    save_safetensors(tmp_path / "te.safetensors", {"model.layers.0.self_attn.q_norm.weight": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="not a Qwen-Image VAE: it is a Qwen3 text encoder"):
        read_vae_layout(tmp_path / "te.safetensors")


def test_truncated_file(tmp_path):
    path = save_tiny_vae(tmp_path / "vae.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_vae_layout(path)


def test_damaged_pickle_files(tmp_path):
    (tmp_path / "vae.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="not a PyTorch file"):
        read_vae_layout(tmp_path / "vae.pth")
    torch.save(tiny_vae_weights(), tmp_path / "vae.pt")
    (tmp_path / "vae.pt").write_bytes((tmp_path / "vae.pt").read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match="truncated"):
        read_vae_layout(tmp_path / "vae.pt")


def test_statistics_from_the_config_beside_then_header_then_published(tmp_path):
    mean, std = [0.5] * 16, [2.0] * 16
    path = tmp_path / "vae.safetensors"
    save_safetensors(path, tiny_vae_weights(), {"config": json.dumps({"latents_mean": mean, "latents_std": std})})
    assert read_vae_layout(path).config.latents_mean == tuple(mean)
    (tmp_path / "config.json").write_text(json.dumps({"latents_mean": [1.0] * 16, "latents_std": std}))
    assert read_vae_layout(path).config.latents_mean == (1.0,) * 16
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')  # another model's: a folder of single files
    assert read_vae_layout(path).config.latents_std == tuple(std)


def test_folder_of_diffusers(tmp_path):
    (tmp_path / "vae").mkdir()
    save_tiny_vae(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert read_vae_layout(tmp_path / "vae").path == read_vae_layout(tmp_path).path
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read_vae_layout(tmp_path / "empty")
