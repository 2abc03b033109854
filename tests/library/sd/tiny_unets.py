"""U-Nets of a few channels, with the structure of the published ones, and weights in memory that look like a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.sd.denoiser import build_unet
from library.sd.unet import StableDiffusionUNet
from library.sd.unet_names import UNetConfig
from networks.layer import LoRAModule

SD1 = UNetConfig(
    widths=(8, 16, 16), depths=(1, 1, 0), middle_depth=1, heads=(2, 2, 2), context_width=12, time_width=16, norm_groups=4
)
SDXL = UNetConfig(widths=(8, 16, 16), depths=(0, 1, 2), middle_depth=2, heads=(1, 2, 2), context_width=12, vector_width=20,
                  time_width=16, norm_groups=4, linear_projections=True)  # fmt: skip


class MemorySource:
    """A WeightsSource of tensors, or of shapes only."""

    def __init__(self, tensors: Mapping[str, Tensor | tuple[int, ...]], *, config: dict | None = None, path: Path = Path("unet")):
        self.path = path
        self.metadata = {} if config is None else {"config": json.dumps({"unet": config})}
        self._tensors = tensors
        self.shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in tensors.items()}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(names)
        yield from ((name, tensor) for name, tensor in self._tensors.items() if name in wanted)  # type: ignore[misc]


def tiny_unet(config: UNetConfig, seed: int = 0) -> StableDiffusionUNet:
    """Frozen, with random weights that keep values at their size."""
    unet = build_unet(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in unet.parameters():
            fan = weight[0].numel() if weight.dim() > 1 else 100
            weight.copy_(torch.randn(weight.shape, generator=generator) * fan**-0.5)
            weight += weight.dim() == 1
    return unet


def settings(config: UNetConfig) -> dict:
    return {"heads": list(config.heads), "norm_groups": config.norm_groups}


def batch(config: UNetConfig, *, size: int = 2, height: int = 8, width: int = 12, rows: int = 7) -> tuple[Tensor | None, ...]:
    """latents, timesteps, context, vector"""
    generator = torch.Generator().manual_seed(height * width + rows)
    vector = torch.randn(size, config.vector_width, generator=generator) if config.vector_width else None
    latents = torch.randn(size, 4, height, width, generator=generator)
    context = torch.randn(size, rows, config.context_width, generator=generator)
    return latents, torch.randint(0, 1000, (size,), generator=generator), context, vector


def add_loras(unet: nn.Module, *, rank: int = 2, convolutions: bool = False) -> nn.ModuleList:
    """On the Linears of the spatial transformers, and on 1x1 convolutions there; ``convolutions``: on those of the rest, too."""
    kinds = ("Transformer2DModel", *(("ResnetBlock2D", "Downsample2D", "Upsample2D") if convolutions else ()))
    torch.manual_seed(3)
    loras = nn.ModuleList()
    for module in unet.modules():
        if type(module).__name__ in kinds:
            layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
            loras.extend(LoRAModule("lora", layer, lora_dim=rank) for layer in layers)
    for lora in loras:
        nn.init.normal_(lora.lora_up.weight, std=0.2)
        lora.apply_to()
    return loras


def step(unet: StableDiffusionUNet, loras: nn.ModuleList, inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The prediction and the gradient of every LoRA."""
    prediction = unet.predict(*inputs)  # type: ignore[arg-type]
    return [prediction.detach(), *torch.autograd.grad(prediction.square().mean(), list(loras.parameters()))]
