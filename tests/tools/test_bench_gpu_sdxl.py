"""The benchmark's phase about the GPU: SDXL, on a tiny one on the CPU, and what is new with it. No times are judged."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from tests.library.anima.tiny_dit import TINY
from tests.library.sd.tiny_unets import SDXL
from tools import bench
from tools.bench_parts import gpu
from tools.bench_parts.figures import Figure
from tools.bench_parts.flops import counted_flops

CPU = torch.device("cpu")
CASES = {case.name: case for case in gpu.SDXL.cases}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(gpu, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(gpu, "STEPS_IN_A_ROW", 1)


def tiny(*names: str) -> gpu.Subject:
    return replace(gpu.SDXL, config=SDXL, cases=[CASES[name] for name in names])


def names_of(figures: list[Figure]) -> list[str]:
    return [figure.name for figure in figures]


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_frozen_layer_by_hand(device: str, wanted: bool):
    linear, convolution = (layer.to(device).requires_grad_(False) for layer in (nn.Linear(3, 7), nn.Conv2d(2, 4, 3, padding=1)))
    rows = torch.ones(5, 3, device=device, requires_grad=wanted)
    picture = torch.ones(1, 2, 6, 8, device=device, requires_grad=wanted)

    def step(layer: nn.Module, x: torch.Tensor) -> None:
        out = layer(x)
        if wanted:
            out.sum().backward()

    products = 1 + wanted  # the input's gradient takes as much as the forward pass, the weights' is not asked for
    assert counted_flops(lambda: step(linear, rows)) == products * 2 * 5 * 3 * 7
    assert counted_flops(lambda: step(convolution, picture)) == products * 2 * 6 * 8 * 3 * 3 * 2 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_by_hand(device: str):
    """Two products forward and four backward, of 3 heads, 5 queries, 6 keys, 8 channels."""
    q, k, v = (torch.ones(1, 3, tokens, 8, device=device, requires_grad=True) for tokens in (5, 6, 6))
    assert counted_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 4) * 3 * 2 * 5 * 6 * 8


@pytest.mark.slow  # ten seconds of counting
def test_the_real_models_step():
    """15 ms at the 989 TFLOP/s of an H200."""
    assert gpu.flops_of(gpu.SDXL, 128, 16) == pytest.approx(14.35e12, rel=0.01)


# ---------------------------------------------------------------- cases


@pytest.mark.slow
def test_the_cases_that_run_anywhere():
    names = ("eager", "checkpointing", "fp8", "checkpointing, fp8")
    figures = gpu.measure(1, subjects=[tiny(*names)], side=8, rank=2, device=CPU)
    steps = [f"gpu: SDXL step, {name}" for name in names]
    assert names_of(figures) == [
        "gpu: SDXL floor of a step",
        *steps,
        "gpu: SDXL fastest step",
        "gpu: SDXL speed, fastest / eager",
    ]
    assert all(figure.value > 0 for figure in figures)
    assert figures[-1].at_least == 2.0 and figures[-1].value > 0


@pytest.mark.slow  # generates and builds C++
def test_a_compiled_case():
    """The compiler is asked for CUDA graphs, and says that it makes none on the CPU. All else of the case is that of "compiled"."""
    name = "compiled, CUDA graphs of inductor"
    config = replace(SDXL, widths=(8,), depths=(1,), heads=(1,), middle_depth=1, layers=1)  # few graphs
    counters["inductor"].clear()
    figures = gpu.measure(1, subjects=[replace(tiny(name), config=config)], side=8, rank=2, device=CPU)
    assert figures[1].name == f"gpu: SDXL step, {name}" and figures[1].value > 0
    assert counters["inductor"]["cudagraph_skips"] > 0


def test_gradients_are_finite_and_weights_learn():
    torch.manual_seed(0)
    step = gpu.training_step(CASES["eager"], tiny("eager"), side=8, rank=2, device=CPU)
    weights = step.optimizer.param_groups[0]["params"]
    before = [weight.detach().clone() for weight in weights]
    for _ in range(2):
        step()
    assert all(weight.isfinite().all() for weight in weights)
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.slow
def test_a_case_that_fails_leaves_the_others(capsys):
    """There are no CUDA graphs on the CPU."""
    subject = tiny("step recorded by the benchmark", "eager")
    figures = gpu.measure(1, subjects=[subject], side=8, rank=2, device=CPU)
    assert math.isnan(figures[1].value) and figures[1].how.startswith("not measured: ")
    assert figures[2].name == "gpu: SDXL step, eager" and figures[2].value > 0
    assert "Traceback" in capsys.readouterr().err


def test_what_could_not_be_measured_shows_in_the_exit_status(capsys, monkeypatch):
    missing = Figure(name="gpu: a step", value=math.nan, unit="ms")
    monkeypatch.setattr(gpu, "measure", lambda repeats: [missing])
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # main() sets it
    assert bench.main(["gpu", "--threads", str(torch.get_num_threads())]) == 1
    assert "not measured: gpu: a step" in capsys.readouterr().err


def test_without_diffusers_anima_is_measured(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "diffusers" else find(name, *more))
    anima = replace(gpu.ANIMA, config=replace(TINY, blocks=1), cases=gpu.ANIMA.cases[:1])
    figures = gpu.measure(1, subjects=[anima, tiny("eager")], side=8, rank=2, device=CPU)
    assert names_of(figures) == ["gpu: floor of a step", "gpu: step, plain", "gpu: fastest step"]
    assert capsys.readouterr().err.count("diffusers, which is not installed here") == 1


# ---------------------------------------------------------------- recording


def test_a_recorded_step_learns_as_a_plain_one_does(monkeypatch):
    """With a stand-in for CUDA graphs: what is replayed runs again, and puts its gradients where they were when it was recorded."""
    recorded, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, other = torch.optim.AdamW([recorded]), torch.optim.AdamW([plain])

    def forward_and_backward() -> None:
        recorded.square().sum().backward()

    class Graph:
        def replay(self) -> None:
            place, recorded.grad = recorded.grad, None
            assert place is not None
            forward_and_backward()
            assert recorded.grad is not None
            recorded.grad = place.copy_(recorded.grad)

    stream = types.SimpleNamespace(wait_stream=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    @contextlib.contextmanager
    def graph(made: Graph, *, stream: Any):
        assert recorded.grad is None  # else the graph would add to it
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    step = gpu.RecordedStep(forward_and_backward, optimizer)
    for _ in range(3):
        step()
        plain.square().sum().backward()
        other.step()
        other.zero_grad()
    assert torch.equal(recorded, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_step_on_a_gpu_moves_weights_as_a_plain_one_does():
    moves = []
    for name in ("eager", "step recorded by the benchmark"):
        torch.manual_seed(0)
        step = gpu.training_step(CASES[name], tiny(name), side=16, rank=2, device=torch.device("cuda"))
        weights = step.optimizer.param_groups[0]["params"]
        before = [weight.detach().clone() for weight in weights]
        for _ in range(3):
            step()
        moves.append(torch.cat([(weight - old).detach().flatten() for weight, old in zip(weights, before, strict=True)]))
    assert (moves[0] - moves[1]).norm() < 0.2 * moves[0].norm()  # rounding turns the sign of the smallest gradients
