"""What --torch_compile gains: a LoRA's training step on a DiT, compiled block by block, against the plain one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import DenoiserConfig
from library.nn.compiling import compile_blocks
from networks import lora_anima
from tools.bench_parts.figures import Figure, alternate, stopwatch
from tools.bench_parts.lora import WIDE, make_inputs, twins

Inputs = tuple[Tensor, Tensor, Tensor]
OTHER_SIDES = (48, 56, 40)  # latent rows and columns of more buckets
GRAPHS = 1.0  # target, forward with its backward: for all blocks and buckets of one batch size
FASTER = 1.0  # target on a GPU; a CPU spends its time in matrix products, which stay what they are


def measure(repeats: int, *, config: DenoiserConfig = WIDE, side: int = 64, rank: int = 16) -> list[Figure]:
    """Float32 on the CPU, bfloat16 where there is a GPU; batch of one; ``side`` as in the phase lora."""
    from torch._dynamo.utils import counters

    place = device_and_dtype()
    plain, compiled = (denoiser.to(*place) for denoiser in twins(config))
    inputs = [on(place, make_inputs(config, size)) for size in (side, *OTHER_SIDES)]
    eager, step = training_step(plain, inputs[0], rank), training_step(compiled, inputs[0], rank)
    compile_blocks(compiled, "inductor")
    counters.clear()
    compile_s = by_the_clock(step)
    for more in inputs[1:]:
        compiled(*more).sum().backward()
    graphs = counters["stats"]["unique_graphs"]
    pairs = alternate(seconds_of(eager, place[0]), seconds_of(step, place[0]), repeats=repeats)
    kind = f"{place[0].type}, {str(place[1]).removeprefix('torch.')}"
    return [
        Figure(name="compile: plain / compiled step", value=pairs.ratio, unit="x",
               at_least=FASTER if place[0].type == "cuda" else None,
               how=f"{kind}; {pairs.described('plain', 'compiled')}"),
        Figure(name="compile: graphs", value=graphs, unit="", at_most=GRAPHS,
               how=f"{config.blocks} blocks, {len(inputs)} sizes of image"),
        Figure(name="compile: first step", value=compile_s, unit="s",
               how="by the clock; less where generated code is still in torch's cache"),
    ]  # fmt: skip


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def on(place: tuple[torch.device, torch.dtype], inputs: Inputs) -> Inputs:
    latents, sigmas, context = inputs
    return latents.to(*place), sigmas.to(place[0]), context.to(*place)


def training_step(denoiser: AnimaDenoiser, inputs: Inputs, rank: int) -> Callable[[], None]:
    """Forward, backward and the optimizer's step of a LoRA on all default modules, and a wait for the device."""
    network = lora_anima.create_network(1.0, rank, float(rank), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    device = inputs[0].device
    groups, _ = network.to(device).prepare_optimizer_params(None, 1e-4)
    optimizer = torch.optim.AdamW(groups)
    gradient = torch.randn_like(inputs[0])

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        denoiser(*inputs).backward(gradient)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def seconds_of(step: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """Seconds of CPU where one thread of it does the work, else by the clock."""
    return stopwatch(step) if device.type == "cpu" else partial(by_the_clock, step)


def by_the_clock(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
