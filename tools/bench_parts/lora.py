"""What a LoRA on all default modules costs: a DiT's training step with it, over forward and input-gradient backward without."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.anima.denoiser import CONTEXT_ROWS, AnimaDenoiser
from library.anima.layout import DenoiserConfig
from networks import lora_anima
from tools.bench_parts.figures import Figure, alternate, stopwatch

RATIO = 1.12  # target
Model = TypeVar("Model", bound=nn.Module)
Inputs = tuple[Any, ...]  # of a denoiser's forward, the latents first
WIDE = DenoiserConfig(width=1024, blocks=4, heads=8, head_dim=128, mlp_hidden=4096, adapter=None)


def measure(repeats: int, *, config: DenoiserConfig = WIDE, side: int = 64, rank: int = 16) -> list[Figure]:
    """``side``: latent rows and columns; 64 are 1024 image tokens. Float32 on the CPU, batch of one."""
    return [cost_of_lora(repeats, twins(config), make_inputs(config, side), rank=rank)]


def cost_of_lora(  # noqa: PLR0913  # two steps and how they are told apart
                 repeats: int, models: tuple[nn.Module, nn.Module], inputs: Inputs, *, rank: int,
                 network: ModuleType = lora_anima, name: str = "", of_all: bool = False) -> Figure:  # fmt: skip
    """``models``: two alike, of which the second gets the LoRA; ``name``: of the model, in the figure. ``of_all``: the step
    without makes the gradients of all inputs, not of the latents alone, as the one with LoRAs must go through all layers."""
    step, backward_only = lora_step(models[1], inputs, rank, network), plain_step(models[0], inputs, of_all=of_all)
    pairs = alternate(stopwatch(step), stopwatch(backward_only), repeats=repeats)
    how = pairs.described("LoRA step", "gradients of all inputs" if of_all else "gradient of the latents")
    return Figure(name=f"{name}LoRA r{rank} step / no LoRA", value=pairs.ratio, unit="x", at_most=RATIO, how=how)


def twins(config: DenoiserConfig) -> tuple[AnimaDenoiser, AnimaDenoiser]:
    """Two frozen denoisers that share their random weights."""
    return twins_of(lambda: AnimaDenoiser(config))


def twins_of(make: Callable[[], Model]) -> tuple[Model, Model]:
    torch.manual_seed(0)
    first = make().requires_grad_(False)
    with torch.device("meta"):
        second = make()
    second.load_state_dict(first.state_dict(), assign=True)
    return first, second.requires_grad_(False)


def make_inputs(config: DenoiserConfig, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """latents (1, 16, side, side), sigmas (1,), context (1, 512, C)"""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, side, side, generator=generator)
    return latents, torch.tensor([0.5]), torch.randn(1, CONTEXT_ROWS, config.context_dim, generator=generator)


def plain_step(denoiser: nn.Module, inputs: Inputs, *, of_all: bool = False) -> Callable[[], None]:
    """Forward, and the gradient of the latents, or ``of_all`` tensors: the noise level and the text, too."""
    given = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    wanted = [value for value in given if isinstance(value, Tensor)][: None if of_all else 1]
    for value in wanted:
        value.requires_grad_()
    gradient = torch.randn_like(given[0])

    def step() -> None:
        for value in wanted:
            value.grad = None
        denoiser(*given).backward(gradient)

    return step


def lora_step(denoiser: nn.Module, inputs: Inputs, rank: int, module: ModuleType = lora_anima) -> Callable[[], None]:
    """Forward, backward and the optimizer's step."""
    network = module.create_network(1.0, rank, float(rank), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    groups, _ = network.prepare_optimizer_params(None, 1e-4)
    optimizer = torch.optim.AdamW(groups)
    latents, *rest = inputs
    gradient = torch.randn_like(latents)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        denoiser(latents, *rest).backward(gradient)
        optimizer.step()

    return step
