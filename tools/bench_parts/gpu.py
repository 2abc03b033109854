"""A training step of the real-size Anima on the GPU: how long, how far from the least that its arithmetic takes, how much memory.

Weights are random and made on the device; 1024x1024 pixels, one image, LoRA of rank 16 in float32, the rest in bfloat16.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.anima.checkpoint import build_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.layout import CONTEXT_ROWS, DenoiserConfig
from library.nn.compiling import compile_blocks
from library.nn.fp8 import use_fp8
from library.nn.fp8_speed import choose_fp8_products
from library.nn.loading import load_into
from library.options.memory import BlockMemoryOptions
from library.training.models.model_memory import arrange_denoiser, denoiser_place
from networks import lora_anima
from tools.bench_parts.figures import Figure
from tools.bench_parts.flops import StepSize, step_flops

REAL = DenoiserConfig(adapter=None)  # the adapter takes a hundredth of a step
DTYPE = torch.bfloat16
CAPTION_ROWS = 60  # T5 tokens of a caption of some length
WARM_UP_STEPS, STEPS_IN_A_ROW = 3, 5
GIB = 2**30
TARGET_MS = {"H200": 85.0}  # of the fastest way that is measured
TARGET_GIB = 5.0
# bfloat16 without sparsity, in operations per second; NVIDIA's data sheets. Of others the measured product is the peak.
PUBLISHED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
PRODUCT_SIDE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to run a step. ``memory``: fields of BlockMemoryOptions."""

    name: str
    memory: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    caption_rows: int | None = CAPTION_ROWS  # of the context; None = the zero rows behind them take part as any other
    fp8: bool = False
    at_most_gib: float | None = None


CHECKPOINTING = {"gradient_checkpointing": True}
CASES = (
    Case(name="plain"),
    Case(name="plain, with the context's zero rows", caption_rows=None),
    Case(name="compiled", compiled=True),
    Case(name="checkpointing", memory=CHECKPOINTING),
    Case(name="cpu offload", memory={"cpu_offload_checkpointing": True}),
    Case(name="unsloth offload", memory={"unsloth_offload_checkpointing": True}),
    Case(name="swap 14", memory={"blocks_to_swap": 14}),
    Case(name="swap 26", memory={"blocks_to_swap": 26}),
    Case(name="swap 26, unsloth offload", memory={"blocks_to_swap": 26, "unsloth_offload_checkpointing": True}),
    Case(name="fp8", fp8=True),
    Case(name="checkpointing, fp8", memory=CHECKPOINTING, fp8=True, at_most_gib=TARGET_GIB),
)


def measure(repeats: int, *, config: DenoiserConfig = REAL, side: int = 128, rank: int = 16, device: torch.device | None = None,
            cases: Sequence[Case] = CASES) -> list[Figure]:  # fmt: skip
    """``side``: latent rows and columns. ``device`` None: the GPU; where there is none, it says so and gives no figures."""
    if device is None:
        if not torch.cuda.is_available():
            print("gpu: no GPU here (it is hidden from other phases: name this one alone)", file=sys.stderr, flush=True)
            return []
        device = torch.device("cuda", torch.cuda.current_device())
    peak, where = matrix_peak(device)
    size = StepSize(tokens=(side // config.patch) ** 2, rank=rank)
    floor_ms = 1000 * step_flops(config, size) / peak
    figures = [Figure(name="gpu: floor of a step", value=floor_ms, unit="ms", how=f"{peak / 1e12:.0f} TFLOP/s, {where}")]
    times = {}
    for case in cases:
        outcome = run_case(case, config=config, side=side, rank=rank, device=device, repeats=repeats)
        times[case.name] = outcome.step_ms
        figures += case_figures(case, outcome, floor_ms)
    target = next((ms for name, ms in TARGET_MS.items() if name in device_name(device)), None)
    fastest = min(times, key=times.__getitem__)
    return [*figures, Figure(name="gpu: fastest step", value=times[fastest], unit="ms", at_most=target, how=fastest)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one case: a step in the median and in the slowest row of steps; the most memory on the device (0 where unknown)."""

    step_ms: float
    slowest_ms: float
    peak_bytes: int


def case_figures(case: Case, outcome: Outcome, floor_ms: float) -> Iterator[Figure]:
    share = f"{100 * floor_ms / outcome.step_ms:.0f} % of the matrix peak, slowest row {outcome.slowest_ms:.1f} ms"
    yield Figure(name=f"gpu: step, {case.name}", value=outcome.step_ms, unit="ms", how=share)
    if outcome.peak_bytes:
        yield Figure(name=f"gpu: memory, {case.name}", value=outcome.peak_bytes / GIB, unit="GiB", at_most=case.at_most_gib)


def run_case(case: Case, *, config: DenoiserConfig, side: int, rank: int, device: torch.device, repeats: int) -> Outcome:
    step = training_step(case, config, side=side, rank=rank, device=device)
    for _ in range(WARM_UP_STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [timed_ms(partial(several, step), device) / STEPS_IN_A_ROW for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    del step
    free_memory(device)
    return Outcome(median(times), max(times), peak)


def several(step: Callable[[], None]) -> None:
    """The host is ahead of the device, as in training."""
    for _ in range(STEPS_IN_A_ROW):
        step()


def training_step(case: Case, config: DenoiserConfig, *, side: int, rank: int, device: torch.device) -> Callable[[], None]:
    """Forward, backward and the optimizer's step, on inputs that stay the same."""
    denoiser, network = make_model(case, config, rank=rank, device=device)
    groups, _ = network.prepare_optimizer_params(None, 1e-4)
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    latents = torch.randn(1, config.in_channels, side, side, device=device)
    target, sigmas = torch.randn_like(latents), torch.full((1,), 0.5, device=device)
    context = torch.randn(1, CONTEXT_ROWS, config.context_dim, device=device)
    context[:, CAPTION_ROWS:] = 0

    def step() -> None:
        with torch.autocast(device.type, DTYPE):
            prediction = denoiser(latents, sigmas, context, used_rows=case.caption_rows)
        F.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_model(case: Case, config: DenoiserConfig, *, rank: int, device: torch.device) -> tuple[AnimaDenoiser, Any]:
    """The denoiser and its network, put together as in training."""
    options = SimpleNamespace(memory=BlockMemoryOptions(**case.memory))
    denoiser = build_denoiser(config)
    if case.fp8:
        use_fp8(denoiser, DENOISER_FP8_LAYERS)
    load_into(denoiser, random_weights(denoiser, device), device=denoiser_place(options, denoiser, device), dtype=DTYPE)
    network = lora_anima.create_network(1.0, rank, float(rank), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    network.to(device).train()
    if case.fp8:
        choose_fp8_products(denoiser, device, dtype=DTYPE)
    if case.compiled:
        compile_blocks(denoiser, "inductor")
    arrange_denoiser(options, denoiser, device)
    return denoiser, network


def random_weights(denoiser: AnimaDenoiser, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Scaled so that no layer is dead; one at a time."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in denoiser.state_dict().items():
        if tensor.dim() == 1:
            yield name, torch.ones(tensor.shape, device=device, dtype=DTYPE)
        else:
            values = torch.randn(tensor.shape, generator=generator, device=device, dtype=DTYPE)
            yield name, values.div_(tensor.shape[-1] ** 0.5)


# ---------------------------------------------------------------- the device


def matrix_peak(device: torch.device, side: int | None = None) -> tuple[float, str]:
    """Operations per second of bfloat16 products, and where the number is from."""
    name = device_name(device)
    for known, peak in PUBLISHED_PEAKS.items():
        if known in name:
            return peak, f"published for {known}"
    side = side or (PRODUCT_SIDE if device.type == "cuda" else 256)
    a = torch.randn(side, side, device=device, dtype=DTYPE)
    times = [timed_ms(lambda: a @ a, device) for _ in range(10)]
    return 2 * side**3 / (min(times) / 1000), f"the fastest of ten products of {side} x {side} matrices"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def timed_ms(work: Callable[[], object], device: torch.device) -> float:
    """By the clock, until the device is done."""
    wait_for(device)
    begin = time.perf_counter()
    work()
    wait_for(device)
    return 1000 * (time.perf_counter() - begin)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """What the case before has left must not count in the next one."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
