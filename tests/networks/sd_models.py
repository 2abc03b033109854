"""U-Nets and text encoders of Stable Diffusion: diffusers' and transformers' classes, of published or of tiny sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CROSS, PLAIN = "CrossAttn", ""
SD_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL_LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
PUBLISHED_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**SD_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {**SD_LEVELS, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)},
    "sdxl": {
        **SDXL_LEVELS,
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TINY = {"norm_num_groups": 4, "sample_size": 8}
TINY_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**TINY, **SD_LEVELS, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 16, "attention_head_dim": 2},
    "sd2": {
        **TINY,
        **SD_LEVELS,
        "block_out_channels": (8, 16, 16, 16),
        "cross_attention_dim": 16,
        "attention_head_dim": (1, 2, 2, 2),
    },
    "sdxl": {
        **TINY,
        **SDXL_LEVELS,
        "block_out_channels": (8, 16, 16),
        "cross_attention_dim": 40,
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 2, 3),
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 24 + 6 * 4,
    },
}
PUBLISHED_TEXTS = {"sd1": [(768, 12, 3072)], "sd2": [(1024, 23, 4096)], "sdxl": [(768, 12, 3072), (1280, 32, 5120)]}
TINY_TEXTS = {"sd1": [(16, 2, 32)], "sd2": [(16, 2, 32)], "sdxl": [(16, 2, 32), (24, 2, 32)]}


def unet_of(kind: str, *, tiny: bool = False, linear: bool | None = None) -> nn.Module:
    """Frozen; of published sizes on the meta device. ``linear`` decides what proj_in and proj_out are, else as ours has them."""
    from diffusers import UNet2DConditionModel

    config = {**(TINY_UNETS if tiny else PUBLISHED_UNETS)[kind]}
    if linear is not None:
        config["use_linear_projection"] = linear
    with torch.device("cpu" if tiny else "meta"):
        return UNet2DConditionModel(**config).requires_grad_(False).eval()


def text_encoders_of(kind: str, *, tiny: bool = False) -> list[nn.Module]:
    """transformers' classes, the second of SDXL with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders: list[nn.Module] = []
    for width, layers, inner in (TINY_TEXTS if tiny else PUBLISHED_TEXTS)[kind]:
        config = CLIPTextConfig(
            hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=2 if tiny else 8,
            vocab_size=64, projection_dim=width, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        with torch.device("cpu" if tiny else "meta"):
            made = CLIPTextModelWithProjection(config) if encoders else CLIPTextModel(config)
        encoders.append(made.requires_grad_(False).eval())
    return encoders
