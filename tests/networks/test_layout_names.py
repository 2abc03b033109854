"""Keys of LoRA files, and what is said of files that are none of ours."""

from __future__ import annotations

import pytest

from library.errors import CheckpointError
from networks.anima_layouts import ANIMA_NAMES
from networks.layout_names import ALPHA, COMFY, DIFFUSERS, DOWN, OURS, UP, understood

Q_PROJ = "diffusion_model.blocks.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("ending", "part"),
    [
        (".lora_down.weight", DOWN),
        (".lora_up.weight", UP),
        (".lora_A.weight", DOWN),
        (".lora_B.weight", UP),
        (".lora_A.default.weight", DOWN),
        (".lora_B.default.weight", UP),
        (".lora_A", DOWN),
        (".lora_B", UP),
        (".lora.down.weight", DOWN),
        (".lora.up.weight", UP),
        ("_lora.down.weight", DOWN),
        ("_lora.up.weight", UP),
        (".lora_linear_layer.down.weight", DOWN),
        (".lora_linear_layer.up.weight", UP),
        (".alpha", ALPHA),
    ],
)
def test_every_ending_that_comfyui_takes(ending, part):
    key = ANIMA_NAMES.find(Q_PROJ + ending)
    assert key is not None and (key.part, key.number, key.layout) == (part, "0", COMFY)
    assert key.name(DIFFUSERS) == "transformer.transformer_blocks.0.attn1.to_q"


def test_all_keys_of_a_file():
    keys = understood("a.safetensors", [f"{Q_PROJ}.lora_A.weight", "lora_te_layers_3_mlp_up_proj.alpha"], ANIMA_NAMES)
    assert [(key.name(OURS), key.layout) for key in keys.values()] == [
        ("lora_unet_blocks_0_self_attn_q_proj", COMFY),
        ("lora_te_layers_3_mlp_up_proj", OURS),
    ]


def said(*keys: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        understood("a.safetensors", keys, ANIMA_NAMES)
    (problem,) = caught.value.problems
    return problem


def test_one_unknown_name_among_known_ones():
    text = said(f"{Q_PROJ}.lora_A.weight", "lora_unet_blocks_5_self_atn_q_proj.lora_up.weight")
    assert "1 of 2 tensors have names that no LoRA for Anima has: lora_unet_blocks_5_self_atn_q_proj (did" in text
    assert "(did you mean lora_unet_blocks_5_self_attn_q_proj?)" in text


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_blocks_0_mlp_layer1.lokr_w1", "LoKr"),
        ("lycoris_blocks_0_mlp_layer1.hada_w2_b", "LoHa"),
        ("diffusion_model.blocks.0.mlp.layer1.dora_scale", "DoRA"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_blocks_0_mlp_layer1.oft_blocks", "OFT"),
        ("lora_unet_blocks_0_mlp_layer1.lora_mid.weight", "LoCon"),
        ("diffusion_model.final_layer.linear.diff", "full weight difference"),
    ],
)
def test_other_adapters_are_named(key, kind):
    assert f"is no plain LoRA but a {kind} file" in said(f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight", key)


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "SDXL"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", "SDXL"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "Stable Diffusion 1.x or 2.x"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight", "SD3"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight", "SD3"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight", "Qwen-Image"),
        ("lora_unet_layers_0_attention_qkv.lora_up.weight", "Lumina Image 2.0"),
        ("diffusion_model.blocks.0.ffn.0.lora_A.weight", "Wan"),
    ],
)
def test_loras_for_other_models_are_named(key, model):
    assert f"a.safetensors is a LoRA for {model}, not for Anima" in said(key)


@pytest.mark.parametrize(
    ("block", "model"), [("double_blocks_0_img_attn_qkv", "FLUX"), ("joint_blocks_0_x_block_attn_qkv", "SD3")]
)
def test_text_encoders_do_not_make_it_one_for_sdxl(block, model):
    """FLUX and SD3 have CLIP-L too, which SDXL's files call lora_te1."""
    text = said("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", f"lora_unet_{block}.lora_up.weight")
    assert f"a.safetensors is a LoRA for {model}, not for Anima" in text


def test_a_lora_for_nobody_knows_what():
    assert "is a LoRA not for Anima (its names are like foo.lora_up.weight" in said("foo.lora_up.weight")


def test_files_that_are_no_lora():
    assert "a.safetensors is an Anima DiT, not a LoRA file" in said("blocks.0.mlp.layer1.weight", "llm_adapter.embed.weight")
    assert "a.safetensors is no LoRA file: it holds no pairs" in said("weight")
    assert "a.safetensors is no LoRA file: it holds no pairs" in said()
