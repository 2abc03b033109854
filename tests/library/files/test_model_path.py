from __future__ import annotations

from pathlib import Path

import pytest

from library.errors import CheckpointError
from library.files.model_path import (
    ANIMA_DIT,
    CLIP,
    CONTROLNET,
    COSMOS_DIT,
    GEMMA,
    LLM_ADAPTER,
    LORA,
    LUMINA,
    LUMINA_DIFFUSERS,
    QWEN3,
    QWEN_IMAGE_VAE,
    SD1,
    SD2,
    SD3,
    SD3_DIFFUSERS,
    SD_UNCLIP,
    SDXL,
    SDXL_REFINER,
    T5,
    TRAINED_BY,
    described,
    find_model_file,
    recognise,
    recognise_keys,
)
from library.files.safetensors_file import SafetensorsHeader, TensorInfo

REPOSITORY = Path(__file__).resolve().parents[3]
KEYS = {
    ANIMA_DIT: ["net.blocks.0.mlp.layer1.weight", "net.llm_adapter.blocks.0.cross_attn.q_proj.weight"],
    COSMOS_DIT: ["blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight"],
    LLM_ADAPTER: ["blocks.0.cross_attn.o_proj.weight", "embed.weight"],
    CONTROLNET: [
        "control_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "control_model.input_hint_block.0.bias",
    ],
    SDXL_REFINER: ["conditioner.embedders.0.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.weight"],
    SD_UNCLIP: ["cond_stage_model.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.weight"],
    LORA: ["lora_unet_blocks_0_mlp_layer1.lora_down.weight", "lora_unet_blocks_0_mlp_layer1.alpha"],
    SDXL: ["conditioner.embedders.1.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.weight"],
    SD2: ["cond_stage_model.model.ln_final.bias", "model.diffusion_model.input_blocks.1.0.weight"],
    SD1: ["cond_stage_model.transformer.text_model.final_layer_norm.bias"],
    SD3: [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "first_stage_model.encoder.mid.block_1.norm1.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
    ],
    SD3_DIFFUSERS: ["transformer_blocks.0.ff_context.net.0.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"],
    LUMINA: ["cap_embedder.0.weight", "layers.0.attention.qkv.weight"],
    LUMINA_DIFFUSERS: ["time_caption_embed.caption_embedder.0.weight", "context_refiner.0.attn.to_q.weight"],
    "Z-Image checkpoint": ["cap_embedder.0.weight", "cap_pad_token", "layers.0.attention.qkv.weight"],
    "NewBie checkpoint": ["cap_embedder.0.weight", "clip_text_pooled_proj.0.weight"],
    "FLUX checkpoint": ["double_blocks.0.img_attn.qkv.weight"],
    QWEN_IMAGE_VAE: ["conv1.bias", "encoder.downsamples.0.residual.0.gamma"],
    "Stable Diffusion VAE": ["encoder.mid.block_1.norm1.weight", "decoder.conv_in.bias"],
    QWEN3: ["model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"],
    "Gemma 3 text encoder": ["layers.0.pre_feedforward_layernorm.weight", "layers.0.self_attn.q_norm.weight"],
    GEMMA: ["model.layers.0.pre_feedforward_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"],
    T5: ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    CLIP: ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
}


def header_of(path, keys) -> SafetensorsHeader:
    return SafetensorsHeader(path, {key: TensorInfo("F32", (1,), 0, 4) for key in keys}, {})


@pytest.mark.parametrize("kind", KEYS)
def test_kinds_are_recognised_by_their_keys(kind, tmp_path):
    assert recognise(header_of(tmp_path / "x.safetensors", KEYS[kind])) == kind


def test_unknown_keys_are_not_guessed():
    assert recognise_keys(["some.weight", "other.bias"]) is None


def test_diffusers_layout_of_the_vae_is_recognised():
    assert (
        recognise_keys(["encoder.conv_in.bias", "decoder.mid_block.resnets.0.norm1.gamma", "quant_conv.weight"]) == QWEN_IMAGE_VAE
    )


def test_the_script_that_trains_a_kind_is_named():
    assert described(SDXL) == "an SDXL checkpoint (sdxl_train_network.py trains those)"
    assert described(SD1) == "a Stable Diffusion 1.x checkpoint (train_network.py trains those)"
    assert described("FLUX checkpoint") == "a FLUX checkpoint"
    for script in TRAINED_BY.values():
        assert (REPOSITORY / script.split()[0]).is_file(), script


def test_file_is_found(tmp_path):
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"x")
    assert find_model_file("--vae", str(file), QWEN_IMAGE_VAE) == file
    assert find_model_file("--qwen3", tmp_path, QWEN3, allow_folder=True) == tmp_path


def test_mistyped_name_suggests_its_neighbour(tmp_path):
    (tmp_path / "qwen_image_vae.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="--vae .* does not exist.*did you mean qwen_image_vae.safetensors") as caught:
        find_model_file("--vae", tmp_path / "qwen_image_vea.safetensors", QWEN_IMAGE_VAE)
    assert "Qwen-Image VAE" in str(caught.value)


def test_mistyped_folder_is_named(tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match="there is no folder .*modles; did you mean .*models"):
        find_model_file("--vae", tmp_path / "modles" / "deep" / "vae.safetensors", QWEN_IMAGE_VAE)


def test_folder_instead_of_a_file_names_the_files_in_it(tmp_path):
    (tmp_path / "anima.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a folder: give the file of the Anima DiT .in it: anima.safetensors"):
        find_model_file("--pretrained_model_name_or_path", tmp_path, ANIMA_DIT)


@pytest.mark.parametrize("nothing", [None, ""])
def test_missing_value_names_the_flag(nothing):
    with pytest.raises(CheckpointError, match="--qwen3 is missing: give the path of the Qwen3 text encoder"):
        find_model_file("--qwen3", nothing, QWEN3)


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "vae.safetensors").symlink_to("gone")
    with pytest.raises(
        CheckpointError, match=r"does not exist: .* \(.*vae.safetensors is a link that leads nowhere \(to gone\)\)"
    ):
        find_model_file("--vae", tmp_path / "vae.safetensors", QWEN_IMAGE_VAE)


def test_one_of_several_shards_is_told_as_such(tmp_path):
    shard, alone = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00001-of-00001.safetensors"
    for path in (shard, alone):
        path.write_bytes(b"x")
    assert find_model_file("--qwen3", alone, QWEN3) == alone
    with pytest.raises(CheckpointError, match=r"one of 2 shards of a model: copy or download the others and model\.safetensors"):
        find_model_file("--qwen3", shard, QWEN3, allow_folder=True)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"--qwen3 .*: this is one of 2 shards .*: give the folder .*, or model\.safetensors\.index"
    ):
        find_model_file("--qwen3", shard, QWEN3, allow_folder=True)
    with pytest.raises(CheckpointError, match="shards of a model: give the model as one file"):
        find_model_file("--pretrained_model_name_or_path", shard, ANIMA_DIT)
