"""MMDiTs and text encoders of Stable Diffusion 3 and 3.5, of published or of tiny sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from library.sd.clip import build_clip
from library.sd3.checkpoint import build_denoiser
from library.sd3.denoiser import Mmdit
from library.sd3.layout import MmditConfig
from library.sd3.t5_layout import T5Config
from tests.networks.sd_models import TEXTS, TINY_TEXTS, alive

MEDIUM = MmditConfig()
KINDS = {
    "sd3_medium": MEDIUM,
    "sd35_medium": replace(MEDIUM, qk_norm=True, dual_blocks=tuple(range(13))),
    "sd35_large": replace(MEDIUM, width=2432, blocks=38, heads=38, mlp_hidden=9728, qk_norm=True),
}
TINY = replace(
    MEDIUM, width=16, blocks=3, heads=2, mlp_hidden=32, position_side=8, pooled_width=16 + 24, context_width=32, qk_norm=True,
    dual_blocks=(0, 1),
)  # fmt: skip
T5_XXL = T5Config()
TINY_T5 = T5Config(width=32, layers=2, heads=2, head_dim=8, mlp_width=48, vocabulary=64)
CLIPS = TEXTS["sdxl"]  # CLIP-L and CLIP-G are the same, but for CLIP-L's projection, which has no LoRA
TINY_CLIPS = [replace(TINY_TEXTS["sdxl"][0], projection=16), TINY_TEXTS["sdxl"][1]]


def denoiser_of(kind: str) -> Mmdit:
    """Of published sizes, without memory."""
    return build_denoiser(KINDS[kind])


def text_encoders(*, t5: bool = True) -> list[nn.Module]:
    """Of published sizes, without memory."""
    return [*map(build_clip, CLIPS), *([t5_of(T5_XXL)] if t5 else [])]


def t5_of(config: T5Config) -> nn.Module:
    from library.sd3.t5 import build_t5

    return build_t5(config)


def tiny_denoiser(seed: int = 0) -> Mmdit:
    torch.manual_seed(seed)
    model = alive(build_denoiser(TINY))
    nn.init.normal_(model.pos_embed)
    return model


def tiny_text_encoders(seed: int = 1) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [alive(model) for model in (*map(build_clip, TINY_CLIPS), t5_of(TINY_T5))]
