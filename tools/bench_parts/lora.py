"""What a LoRA on all default modules costs: a DiT's training step with it, over forward and input-gradient backward without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from library.anima.checkpoint import build_denoiser
from library.anima.denoiser import CONTEXT_ROWS, AnimaDenoiser
from library.anima.layout import DenoiserConfig
from networks import lora_anima
from tools.bench_parts.figures import Figure, alternate, stopwatch

RATIO = 1.12  # target
WIDE = DenoiserConfig(width=1024, blocks=4, heads=8, head_dim=128, mlp_hidden=4096, adapter=None)


def measure(repeats: int, *, config: DenoiserConfig = WIDE, side: int = 64, rank: int = 16) -> list[Figure]:
    """``side``: latent rows and columns; 64 are 1024 image tokens. Float32 on the CPU, batch of one."""
    plain, adapted = twins(config)
    inputs = make_inputs(config, side)
    step, backward_only = lora_step(adapted, inputs, rank), plain_step(plain, inputs)
    pairs = alternate(stopwatch(step), stopwatch(backward_only), repeats=repeats)
    how = pairs.described("LoRA step", "input gradient")
    return [Figure(name=f"LoRA r{rank} step / no LoRA", value=pairs.ratio, unit="x", at_most=RATIO, how=how)]


def twins(config: DenoiserConfig) -> tuple[AnimaDenoiser, AnimaDenoiser]:
    """Two frozen denoisers that share their random weights."""
    torch.manual_seed(0)
    first, second = AnimaDenoiser(config).requires_grad_(False), build_denoiser(config)
    second.load_state_dict(first.state_dict(), assign=True)
    return first, second.requires_grad_(False)


def make_inputs(config: DenoiserConfig, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """latents (1, 16, side, side), sigmas (1,), context (1, 512, C)"""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, side, side, generator=generator)
    return latents, torch.tensor([0.5]), torch.randn(1, CONTEXT_ROWS, config.context_dim, generator=generator)


def plain_step(denoiser: AnimaDenoiser, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    latents, sigmas, context = inputs
    latents = latents.clone().requires_grad_()
    gradient = torch.randn_like(latents)

    def step() -> None:
        latents.grad = None
        denoiser(latents, sigmas, context).backward(gradient)

    return step


def lora_step(denoiser: AnimaDenoiser, inputs: tuple[Tensor, Tensor, Tensor], rank: int) -> Callable[[], None]:
    """Forward, backward and the optimizer's step."""
    network = lora_anima.create_network(1.0, rank, float(rank), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    groups, _ = network.prepare_optimizer_params(None, 1e-4)
    optimizer = torch.optim.AdamW(groups)
    latents, sigmas, context = inputs
    gradient = torch.randn_like(latents)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        denoiser(latents, sigmas, context).backward(gradient)
        optimizer.step()

    return step
