from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.anima.checkpoint import build_denoiser
from library.anima.layout import DenoiserConfig, expected_shapes, read_denoiser_layout
from library.errors import CheckpointError
from library.files.safetensors_file import save_safetensors
from tests.library.anima.tiny_dit import TINY, save_tiny, tiny_weights

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = Path(__file__).with_name("published_keys.json")


def adapter_weights() -> dict[str, torch.Tensor]:
    return {name: t for name, t in tiny_weights(seed=5).items() if name.startswith("llm_adapter.")}


def without_adapter() -> dict[str, None]:
    return {name.replace(".", "__"): None for name in adapter_weights()}


def test_needs_no_torch():
    code = "import sys, library.anima.layout, library.files.model_path; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("prefix", ["net.", "", "model.diffusion_model.", "model.diffusion_model.net.", "diffusion_model."])
def test_every_prefix_is_read(tmp_path, prefix):
    layout = read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors", prefix=prefix))
    assert layout.config == TINY
    (source,) = layout.sources
    assert source.names[f"{prefix}blocks.1.self_attn.q_proj.weight"] == "blocks.1.self_attn.q_proj.weight"
    assert sorted(source.names.values()) == sorted(expected_shapes(TINY))


@pytest.mark.parametrize(
    "changes", [{"blocks": 5}, {"width": 64, "head_dim": 32}, {"heads": 3, "mlp_hidden": 96}, {"adaln_dim": 4, "context_dim": 24}]
)
def test_sizes_come_from_the_shapes(tmp_path, changes):
    config = replace(TINY, **changes)
    assert read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors", config=config)).config == config


def test_adapter_sizes_come_from_the_shapes(tmp_path):
    adapter = replace(TINY.adapter, vocabulary=99, width=24, source_width=16, blocks=3, heads=3, head_dim=8, mlp_hidden=40)
    config = replace(TINY, adapter=adapter)
    assert read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors", config=config)).config == config


def test_published_keys_are_those_of_the_published_config():
    listed = json.loads(PUBLISHED.read_text())
    published = dict(listed["once"])
    for part, count, prefix in (("per_block", "blocks", ""), ("per_adapter_block", "adapter_blocks", "llm_adapter.")):
        for i in range(listed[count]):
            published.update({f"{prefix}blocks.{i}.{name}": shape for name, shape in listed[part].items()})
    assert len(published) == listed["tensors"]
    module = build_denoiser(DenoiserConfig())
    assert all(tensor.is_meta for tensor in module.parameters())
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == published
    assert {name: list(shape) for name, shape in expected_shapes(DenoiserConfig()).items()} == published


def test_recomputed_buffers_are_tolerated(tmp_path):
    path = save_tiny(tmp_path / "dit.safetensors", pos_embedder__seq=torch.arange(8.0))
    (source,) = read_denoiser_layout(path).sources
    assert not any("pos_embedder" in name for name in source.names)


def test_other_models_of_a_bundle_are_left_out(tmp_path):
    weights = {f"model.diffusion_model.{name}": t for name, t in tiny_weights().items()}
    save_safetensors(tmp_path / "all.safetensors", {**weights, "vae.conv1.bias": torch.zeros(3)})
    (source,) = read_denoiser_layout(tmp_path / "all.safetensors").sources
    assert "vae.conv1.bias" not in source.names


@pytest.mark.parametrize("prefix", ["llm_adapter.", "net.llm_adapter.", ""])
def test_separate_adapter(tmp_path, prefix):
    dit = save_tiny(tmp_path / "dit.safetensors", **without_adapter())
    given = {prefix + name.removeprefix("llm_adapter."): t for name, t in adapter_weights().items()}
    save_safetensors(tmp_path / "adapter.safetensors", given)
    layout = read_denoiser_layout(dit, tmp_path / "adapter.safetensors")
    assert layout.config == TINY and layout.files == (dit, tmp_path / "adapter.safetensors")


def test_given_adapter_wins_over_the_one_inside(tmp_path):
    dit = save_tiny(tmp_path / "dit.safetensors")
    other = save_tiny(tmp_path / "other.safetensors")
    own, adapter = read_denoiser_layout(dit, other).sources
    assert not any(name.startswith("llm_adapter.") for name in own.names.values())
    assert adapter.header.path == other and all(name.startswith("llm_adapter.") for name in adapter.names.values())


def test_dit_without_adapter_names_the_flag(tmp_path):
    dit = save_tiny(tmp_path / "dit.safetensors", **without_adapter())
    with pytest.raises(CheckpointError, match="no LLM adapter .*--llm_adapter_path"):
        read_denoiser_layout(dit)


def test_settings_come_from_a_file_beside_then_from_the_header(tmp_path):
    weights = {f"net.{name}": t for name, t in tiny_weights().items()}
    inside = {"config": json.dumps({"rope_h_extrapolation_ratio": 3.0, "llm_adapter": {"rope_theta": 500.0}})}
    save_safetensors(tmp_path / "dit.safetensors", weights, inside)
    config = read_denoiser_layout(tmp_path / "dit.safetensors").config
    assert (config.rope_h_ratio, config.rope_w_ratio, config.adapter.rope_theta) == (3.0, 4.0, 500.0)
    (tmp_path / "config.json").write_text('{"rope_w_extrapolation_ratio": 2}')
    config = read_denoiser_layout(tmp_path / "dit.safetensors").config
    assert (config.rope_h_ratio, config.rope_w_ratio, config.adapter.rope_theta) == (4.0, 2.0, 10000.0)


@pytest.mark.parametrize(
    ("text", "message"), [("{not json", "config.json is not readable"), ('{"rope_h_extrapolation_ratio": "x"}', "'x'")]
)
def test_bad_settings_are_named(tmp_path, text, message):
    save_tiny(tmp_path / "dit.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_denoiser_layout(tmp_path / "dit.safetensors")


def test_all_wrong_keys_are_in_one_error(tmp_path):
    path = save_tiny(
        tmp_path / "dit.safetensors",
        blocks__1__mlp__layer1__weight=None,
        llm_adapter__norm__weight=None,
        blocks__0__self_attn__q_proj__weight=torch.zeros(48, 31),
        blocks__0__stray__weight=torch.zeros(1),
    )
    with pytest.raises(CheckpointError) as caught:
        read_denoiser_layout(path)
    assert len(caught.value.problems) == 1
    text = str(caught.value)
    assert "2 missing: blocks.1.mlp.layer1.weight, llm_adapter.norm.weight" in text
    assert "1 unexpected: blocks.0.stray.weight" in text
    assert "blocks.0.self_attn.q_proj.weight (48x31 instead of 48x32)" in text
    assert "2 blocks of width 32" in text and str(path) in text


@pytest.mark.parametrize("name", ["x_embedder__proj__1__weight", "final_layer__linear__weight", "t_embedding_norm__weight"])
def test_one_missing_key_is_the_only_complaint(tmp_path, name):
    with pytest.raises(CheckpointError) as caught:
        read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors", **{name: None}))
    assert f"1 missing: {name.replace('__', '.')} (read as" in str(caught.value)
    assert "shape" not in str(caught.value) and "unexpected" not in str(caught.value)


def test_many_missing_keys_are_counted(tmp_path):
    gone = {name.replace(".", "__"): None for name in tiny_weights() if name.startswith("blocks.0.")}
    with pytest.raises(CheckpointError, match=r"20 missing: .* and 8 more"):
        read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors", **gone))


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["model.diffusion_model.label_emb.0.0.weight"], "an SDXL checkpoint"),
        (["cond_stage_model.transformer.text_model.final_layer_norm.bias"], "a Stable Diffusion 1.x checkpoint"),
        (["cap_embedder.0.weight"], "a Lumina Image 2.0 checkpoint"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "an SD3 or SD3.5 checkpoint"),
        (["double_blocks.0.img_attn.qkv.weight"], "a FLUX checkpoint"),
        (["model.layers.0.self_attn.q_norm.weight"], "a Qwen3 text encoder"),
        (["conv1.bias", "encoder.downsamples.0.residual.0.gamma"], "a Qwen-Image VAE"),
        (["lora_unet_blocks_0_mlp_layer1.lora_down.weight"], "a LoRA file"),
    ],
)
def test_other_models_are_named(tmp_path, keys, kind):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {key: torch.zeros(1) for key in keys})
    with pytest.raises(
        CheckpointError, match=f"--pretrained_model_name_or_path .*model.safetensors is {kind}.*, not an Anima DiT"
    ):
        read_denoiser_layout(path)
    with pytest.raises(CheckpointError, match=f"--llm_adapter_path .* is {kind}, not an LLM adapter"):
        read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors"), path)


def test_unknown_model_is_refused(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {"mystery.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is not an Anima DiT: none of its 1 keys is known, for example mystery.weight"):
        read_denoiser_layout(tmp_path / "x.safetensors")


def test_adapter_file_as_the_dit_is_named(tmp_path):
    save_safetensors(tmp_path / "adapter.safetensors", adapter_weights())
    with pytest.raises(CheckpointError, match="is an LLM adapter of Anima, not an Anima DiT"):
        read_denoiser_layout(tmp_path / "adapter.safetensors")


def test_truncated_file(tmp_path):
    path = save_tiny(tmp_path / "dit.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="dit.safetensors is truncated"):
        read_denoiser_layout(path)


def test_missing_file_suggests_a_neighbour(tmp_path):
    save_tiny(tmp_path / "anima.safetensors")
    with pytest.raises(CheckpointError, match="--pretrained_model_name_or_path .*did you mean anima.safetensors"):
        read_denoiser_layout(tmp_path / "anma.safetensors")
    with pytest.raises(CheckpointError, match="--pretrained_model_name_or_path is missing"):
        read_denoiser_layout(None)


def test_integer_weights_are_refused(tmp_path):
    path = save_tiny(tmp_path / "dit.safetensors", t_embedding_norm__weight=torch.zeros(32, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="1 tensors are stored as I8"):
        read_denoiser_layout(path)


def test_head_width_without_room_for_rope_is_refused(tmp_path):
    path = save_tiny(tmp_path / "dit.safetensors", config=replace(TINY, heads=4, head_dim=8))
    with pytest.raises(CheckpointError, match="head width is 8; even numbers from 12 on"):
        read_denoiser_layout(path)
