"""The real-size SDXL of the phase ``gpu``: its sizes, its inputs, and the operations of its training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.sd.denoiser import build_unet
from library.sd.unet_names import UNetConfig
from networks import lora
from tools.bench_parts.flops import counted_flops
from tools.bench_parts.unet import make_inputs

if TYPE_CHECKING:
    from library.sd.unet import StableDiffusionUNet

REAL = UNetConfig(  # arXiv 2307.01952, table 1
    widths=(320, 640, 1280),
    depths=(0, 2, 10),
    middle_depth=10,
    heads=(5, 10, 20),
    context_width=2048,
    vector_width=2816,
    time_width=1280,
    linear_projections=True,
)


def predictor(unet: StableDiffusionUNet, config: UNetConfig, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Latents (1, 4, h, w) -> what the model predicts, for a caption, a time and sizes that stay the same."""
    _, *inputs = (given.to(device) for given in make_inputs(config, side=1))
    return lambda latents: unet.predict(latents, *inputs)


def flops(config: UNetConfig, side: int, rank: int) -> int:
    """Of a step's forward and backward with ``side`` latent rows and columns and a LoRA on the default modules, without
    checkpointing. Nothing is computed."""
    unet = build_unet(config).double()  # autocast, which LoRAs ask about at all other types, does not know the meta device
    network: Any = lora.create_network(1.0, rank, float(rank), None, None, unet)
    network.apply_to(None, unet, False, True)
    network.to("meta").train()
    predict = predictor(unet, config, "meta")
    latents = torch.empty(1, config.in_channels, side, side, dtype=torch.float64, device="meta")
    return counted_flops(lambda: predict(latents).sum().backward())
