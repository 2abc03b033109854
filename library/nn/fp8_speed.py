"""Whether a GPU multiplies in 8 bits faster than it dequantises and multiplies in 16: measured on the model's own layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from library.nn.fp8 import fp8_layers, frozen_product, quantised

CLEARLY_FASTER = 1.15  # the 8 bit product rounds the input as well, so it must be worth it
MULTIPLE = 16  # of both sides, which the product wants
TOKENS = 4096  # of one 1024 x 1024 image
FEW_TOKENS = 37  # as a short caption has: no multiple of anything
REPEATS, ROUNDS = 5, 10  # measurements, and products in each
WRONG = 0.1  # relative error; rounding the input makes 0.026
CAPABILITY = (8, 9)  # of CUDA devices: the first with 8 bit floating point products (Ada)

Shape = tuple[int, int]  # (M, K)
Gather = Callable[[Any], Sequence[Any]]  # the value of each process, as HostGroup.gather


def alone(value: Any) -> Sequence[Any]:
    return [value]


def choose_fp8_products(
    model: nn.Module, device: torch.device, *, dtype: torch.dtype, tokens: int = TOKENS, gather: Gather = alone
) -> str:
    """Sets ``fast`` of the model's layers in 8 bits by the clock, shape by shape; returns how they multiply, for the log.

    Measures on ``device``, with ``tokens`` rows of ``dtype``, on weights of its own: the layers may lie anywhere. What the device
    or this torch cannot do stays dequantised. ``gather``: where several processes compute together, all multiply in the way that
    pays for each of them.
    """
    if reasons := [reason for reason in gather(why_not(device, dtype)) if reason]:
        return f"dequantised for their products ({reasons[0]})"
    layers = list(fp8_layers(model))
    shapes = sorted({(layer.out_features, layer.in_features) for layer in layers}, reverse=True)
    measured_by = gather({shape: gain(shape, device, dtype=dtype, tokens=tokens) for shape in shapes})
    gains = {shape: min(found[shape] for found in measured_by) for shape in shapes}
    for layer in layers:
        layer.fast = gains[layer.out_features, layer.in_features] >= CLEARLY_FASTER
    measured = ", ".join(f"{out}x{into}: {gains[out, into]:.2f}x" for out, into in shapes)
    return f"{sum(layer.fast for layer in layers)} of them multiply in 8 bits (speed against dequantising: {measured})"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products in 8 bits are out of the question; None when they may be tried."""
    if device.type != "cuda":
        return "products in 8 bits need an NVIDIA GPU"
    if dtype != torch.bfloat16:
        return "products in 8 bits need bfloat16"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "products in 8 bits need a GPU of compute capability 8.9 or later"
    return None


def gain(shape: Shape, device: torch.device, *, dtype: torch.dtype, tokens: int) -> float:
    """Time of dequantising over time of the product in 8 bits; 0 where that is impossible or gives wrong numbers."""
    if any(side % MULTIPLE for side in shape):
        return 0.0
    rows = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    weight, scale = quantised(torch.randn(shape, device=device, dtype=dtype))

    def product(fast: bool, count: int = tokens) -> Tensor:
        return frozen_product(rows[:count], weight, scale, None, fast=fast)

    try:
        for count in (FEW_TOKENS, tokens):
            exact, fast = product(False, count), product(True, count)
            if not bool((fast - exact).norm() < WRONG * exact.norm()):
                return 0.0
        return seconds(lambda: product(False), device) / seconds(lambda: product(True), device)
    except (RuntimeError, AttributeError, ValueError, TypeError):  # what this torch says about it is of no use to anyone
        return 0.0


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of ``ROUNDS`` times ``work`` on the GPU."""
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            start.record()
            for _ in range(ROUNDS):
                work()
            end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)  # of milliseconds
    return median(times)
