"""What a LoRA on all default modules costs a U-Net: forward and backward with it, over forward and input gradient without."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.sd.denoiser import build_unet
from library.sd.unet_names import UNetConfig
from networks.layer import LoRAModule
from tools.bench_parts.figures import Figure, alternate, stopwatch

if TYPE_CHECKING:
    from library.sd.unet import StableDiffusionUNet

RATIO = 1.15  # target
QUARTER_SDXL = UNetConfig(  # a quarter of each width, with the real depths; heads as wide as they are in the real model, or wider
    widths=(80, 160, 320),
    depths=(0, 2, 10),
    middle_depth=10,
    heads=(1, 2, 4),
    context_width=512,
    vector_width=704,
    time_width=320,
    norm_groups=16,
    linear_projections=True,
)
TEXT_ROWS = 77
TRANSFORMER = "Transformer2DModel"  # the class whose Linears a LoRA-LierLa network adapts

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def measure(repeats: int, *, config: UNetConfig = QUARTER_SDXL, side: int = 64, rank: int = 16) -> list[Figure]:
    """``side``: latent rows and columns. Float32 on the CPU, batch of one. The larger the picture, the less a LoRA adds."""
    plain, adapted = twins(config)
    inputs = make_inputs(config, side)
    pairs = alternate(stopwatch(lora_step(adapted, inputs, rank)), stopwatch(plain_step(plain, inputs)), repeats=repeats)
    how = pairs.described("with LoRA", "input gradient")
    return [Figure(name=f"U-Net: LoRA r{rank} / no LoRA", value=pairs.ratio, unit="x", at_most=RATIO, how=how)]


def twins(config: UNetConfig) -> tuple[StableDiffusionUNet, StableDiffusionUNet]:
    """Two frozen U-Nets that share their random weights."""
    torch.manual_seed(0)
    first, second = build_unet(config), build_unet(config)
    first.to_empty(device="cpu")
    for name, weight in first.named_parameters():
        _fill(name, weight)
    second.load_state_dict(first.state_dict(), assign=True)
    return first.requires_grad_(False), second.requires_grad_(False)


@torch.no_grad()
def _fill(name: str, weight: Tensor) -> None:
    """Norms as they begin, other weights so that values keep their size."""
    if weight.dim() == 1:
        weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    else:
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def make_inputs(config: UNetConfig, side: int) -> Inputs:
    """latents (1, 4, side, side), timesteps (1,), context (1, 77, K), vector (1, V)"""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, side, side, generator=generator)
    context = torch.randn(1, TEXT_ROWS, config.context_width, generator=generator)
    return latents, torch.tensor([500]), context, torch.randn(1, config.vector_width, generator=generator)


def plain_step(unet: StableDiffusionUNet, inputs: Inputs) -> Callable[[], None]:
    """Forward, and the gradient of the latents."""
    latents = inputs[0].clone().requires_grad_()
    gradient = torch.randn_like(latents)

    def step() -> None:
        latents.grad = None
        unet.predict(latents, *inputs[1:]).backward(gradient)

    return step


def lora_step(unet: StableDiffusionUNet, inputs: Inputs, rank: int) -> Callable[[], None]:
    """Forward, and the gradients of every LoRA."""
    weights = list(with_loras(unet, rank).parameters())
    gradient = torch.randn_like(inputs[0])

    def step() -> None:
        for weight in weights:
            weight.grad = None
        unet.predict(*inputs).backward(gradient)

    return step


def with_loras(unet: nn.Module, rank: int) -> nn.ModuleList:
    """Every Linear of the spatial transformers gets one; none of them is new: both sides act."""
    layers = {
        name: layer
        for path, module in unet.named_modules()
        if type(module).__name__ == TRANSFORMER
        for name, layer in module.named_modules(prefix=path)
        if isinstance(layer, nn.Linear)
    }
    loras = [LoRAModule(name, layer, lora_dim=rank) for name, layer in layers.items()]
    for lora in loras:
        nn.init.normal_(lora.lora_up.weight, std=0.01)
        lora.apply_to()
    return nn.ModuleList(loras)
