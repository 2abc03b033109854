"""The real-size SDXL of the phase ``gpu``: its sizes and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.sd.unet_names import UNetConfig
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
