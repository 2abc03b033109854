"""U-Nets and text encoders of Stable Diffusion, of published or of tiny sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from library.sd.clip_layout import ClipConfig
from library.sd.unet_names import UNetConfig

KINDS = ("sd1", "sd2", "sdxl")
SD1 = UNetConfig(
    widths=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), middle_depth=1, heads=(8, 8, 8, 8), context_width=768, time_width=1280
)
SDXL = UNetConfig(
    widths=(320, 640, 1280), depths=(0, 2, 10), middle_depth=10, heads=(5, 10, 20), context_width=2048, vector_width=2816,
    time_width=1280, linear_projections=True,
)  # fmt: skip
UNETS = {"sd1": SD1, "sd2": replace(SD1, heads=(5, 10, 20, 20), context_width=1024), "sdxl": SDXL}
TINY = {"norm_groups": 4, "time_width": 32}
TINY_SD1 = replace(SD1, widths=(8, 16, 16, 16), heads=(2, 2, 2, 2), context_width=16, **TINY)
TINY_UNETS = {
    "sd1": TINY_SD1,
    "sd2": replace(TINY_SD1, heads=(1, 2, 2, 2)),
    "sdxl": replace(SDXL, widths=(8, 16, 16), depths=(0, 2, 3), middle_depth=3, heads=(1, 2, 2), context_width=40,
                    vector_width=24 + 6 * 256, **TINY),
}  # fmt: skip


def clip(width: int, layers: int, inner: int, *, projection: int | None = None, **sizes) -> ClipConfig:
    return ClipConfig(width=width, layers=layers, mlp_width=inner, projection=projection, **sizes)


TEXTS = {
    "sd1": [clip(768, 12, 3072, heads=12, vocabulary=49408, positions=77, activation="quick_gelu")],
    "sd2": [clip(1024, 23, 4096, heads=16, vocabulary=49408, positions=77, activation="gelu")],
    "sdxl": [
        clip(768, 12, 3072, heads=12, vocabulary=49408, positions=77, activation="quick_gelu"),
        clip(1280, 32, 5120, heads=20, vocabulary=49408, positions=77, activation="gelu", projection=1280),
    ],
}
SMALL = {"heads": 2, "vocabulary": 64, "positions": 16, "activation": "gelu"}
TINY_TEXTS = {
    "sd1": [clip(16, 2, 32, **SMALL)],
    "sd2": [clip(16, 2, 32, **SMALL)],
    "sdxl": [clip(16, 2, 32, **SMALL), clip(24, 2, 32, projection=24, **SMALL)],
}


def unet_of(kind: str, *, tiny: bool = False, linear: bool | None = None) -> nn.Module:
    """Of published sizes on the meta device; tiny ones have random weights. ``linear``: what proj_in and proj_out are, else as
    single files are loaded."""
    from library.sd.denoiser import build_unet

    sizes = (TINY_UNETS if tiny else UNETS)[kind]
    unet = build_unet(sizes if linear is None else replace(sizes, linear_projections=linear))
    return alive(unet) if tiny else unet


def text_encoders_of(kind: str, *, tiny: bool = False) -> list[nn.Module]:
    from library.sd.clip import build_clip

    encoders = [build_clip(config) for config in (TINY_TEXTS if tiny else TEXTS)[kind]]
    return [alive(encoder) for encoder in encoders] if tiny else encoders


def alive(model: nn.Module) -> nn.Module:
    """With random weights, frozen, whose outputs are far from zero. Other buffers than weights keep what they hold."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device="cpu")
    for name, buffer in buffers.items():
        model.get_buffer(name).copy_(buffer)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.3 * parameter[0].numel() ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.0)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def randomize(network) -> None:
    """So that the network does something."""
    for made in network.loras:
        nn.init.normal_(made.lora_up.weight, std=0.3)
