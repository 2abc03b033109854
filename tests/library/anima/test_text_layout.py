from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.anima.text_layout import TextEncoderConfig, expected_shapes, read_text_encoder_layout
from library.errors import CheckpointError
from library.files.safetensors_file import save_safetensors
from tests.library.anima.tiny_qwen import SMALL_VOCABULARY, save_tiny_qwen, tiny_qwen_weights

ROOT = Path(__file__).resolve().parents[3]


def save(path: Path, **changes) -> Path:
    return save_tiny_qwen(path, SMALL_VOCABULARY, **changes)


def test_needs_no_torch():
    code = "import sys, library.anima.text_layout, library.anima.tokenizers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("prefix", ["model.", "", "text_encoders.qwen3_06b.transformer.model."])
def test_every_prefix_is_read_and_the_head_ignored(tmp_path, prefix):
    head = {
        f"{prefix.removesuffix('model.')}lm_head.weight": torch.zeros(64, 12),
        **tiny_qwen_weights(SMALL_VOCABULARY, prefix=prefix),
    }
    if prefix.startswith("text_encoders"):
        head["vae.conv1.bias"] = torch.zeros(3)  # such a file holds other models too
    save_safetensors(tmp_path / "qwen3.safetensors", head)
    layout = read_text_encoder_layout(tmp_path / "qwen3.safetensors")
    assert layout.config == SMALL_VOCABULARY
    (source,) = layout.sources
    assert sorted(source.names.values()) == sorted(expected_shapes(SMALL_VOCABULARY))
    assert source.names[f"{prefix}layers.1.mlp.up_proj.weight"] == "layers.1.mlp.up_proj.weight"


def test_published_sizes():
    # the published sizes
    shapes = expected_shapes(TextEncoderConfig())
    assert len(shapes) == 310
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert parameters == 596_049_920


def test_what_shapes_cannot_tell(tmp_path):
    path = save(tmp_path / "model.safetensors")
    assert read_text_encoder_layout(path).config.rope_theta == 1_000_000
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "rope_theta": 5000, "rms_norm_eps": 1e-5, "hidden_size": 99}')
    config = read_text_encoder_layout(path).config
    assert (config.rope_theta, config.norm_eps, config.width) == (5000, 1e-5, 12)
    (tmp_path / "config.json").write_text('{"rope_parameters": {"rope_theta": 7000, "rope_type": "default"}}')
    assert read_text_encoder_layout(tmp_path).config.rope_theta == 7000
    (tmp_path / "config.json").write_text('{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}')
    with pytest.raises(CheckpointError, match="'yarn' rotary scaling"):
        read_text_encoder_layout(tmp_path)


def test_config_of_another_model_beside(tmp_path):
    path = save(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rope_theta": 5000}')
    assert read_text_encoder_layout(path).config.rope_theta == 1_000_000  # a folder of single files
    with pytest.raises(CheckpointError, match="'llama'"):
        read_text_encoder_layout(tmp_path)


def test_sharded_folder(tmp_path):
    weights = tiny_qwen_weights(SMALL_VOCABULARY)
    shards = [dict(list(weights.items())[:9]), dict(list(weights.items())[9:])]
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_safetensors(tmp_path / name, shard)
        index.update({key: name for key in shard})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    layout = read_text_encoder_layout(tmp_path)
    assert layout.config == SMALL_VOCABULARY and len(layout.sources) == 2
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names files that are not there: model-00002-of-00002.safetensors"):
        read_text_encoder_layout(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        read_text_encoder_layout(tmp_path)


def test_wrong_keys_are_listed_together(tmp_path):
    path = save(
        tmp_path / "qwen3.safetensors",
        model__layers__0__mlp__up_proj__weight=None,
        model__layers__1__self_attn__k_norm__weight=torch.zeros(7),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(32),
    )
    with pytest.raises(CheckpointError) as caught:
        read_text_encoder_layout(path)
    text = str(caught.value)
    assert "1 missing: layers.0.mlp.up_proj.weight" in text
    assert "1 unexpected: layers.0.self_attn.q_proj.bias" in text
    assert "layers.1.self_attn.k_norm.weight (7 instead of 8)" in text


def test_another_architecture_is_named(tmp_path):
    save_safetensors(
        tmp_path / "a.safetensors", {"conv1.bias": torch.zeros(1), "encoder.downsamples.0.residual.0.gamma": torch.ones(1)}
    )
    with pytest.raises(CheckpointError, match="is a Qwen-Image VAE, not a Qwen3 text encoder"):
        read_text_encoder_layout(tmp_path / "a.safetensors")
    save_safetensors(tmp_path / "b.safetensors", {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match="of another family, not a Qwen3"):
        read_text_encoder_layout(tmp_path / "b.safetensors")
    save_safetensors(tmp_path / "c.safetensors", {"weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="of another kind"):
        read_text_encoder_layout(tmp_path / "c.safetensors")


def test_missing_paths_and_damaged_files(tmp_path):
    path = save(tmp_path / "qwen3_06b.safetensors")
    with pytest.raises(CheckpointError, match="--qwen3 is missing"):
        read_text_encoder_layout(None)
    with pytest.raises(CheckpointError, match="did you mean qwen3_06b.safetensors"):
        read_text_encoder_layout(tmp_path / "qwen3_06.safetensors")
    with pytest.raises(CheckpointError, match="is a folder without model.safetensors"):
        read_text_encoder_layout(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        read_text_encoder_layout(path)
