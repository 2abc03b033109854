"""The benchmark's phases about memory savers and the GPU, at the smallest sizes on the CPU. No times are judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.anima.layout import DenoiserConfig
from library.nn.checkpointing import run_checkpointed
from networks import lora_anima
from tests.library.anima.tiny_dit import TINY, batch, tiny_denoiser
from tools.bench_parts import gpu, memory
from tools.bench_parts.flops import StepSize, counted_flops, step_flops

NARROW = DenoiserConfig(width=32, blocks=4, heads=2, head_dim=16, mlp_hidden=64, adaln_dim=16, context_dim=16, adapter=None)
CPU = torch.device("cpu")


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(blocks, rank, checkpointing):
    config = replace(TINY, blocks=blocks)
    denoiser = tiny_denoiser(config)
    if rank:
        lora_anima.create_network(1.0, rank, 1.0, None, None, denoiser).apply_to(None, denoiser, False, True)
    if checkpointing:
        denoiser.run_block = run_checkpointed

    def work() -> None:
        out = denoiser(*batch())
        if rank:
            out.sum().backward()

    size = StepSize(tokens=12, rank=rank, images=2, context_rows=12)
    assert counted_flops(work) == step_flops(config, size, checkpointing=checkpointing)


def test_the_real_models_step():
    """40 TFLOP for 1024x1024: 41 ms at the 989 TFLOP/s of an H200."""
    flops = gpu.anima_flops(gpu.ANIMA.config, 128, 16)
    assert flops == pytest.approx(40.4e12, rel=0.01)


def test_memory_phase():
    own, step = memory.measure(1, config=NARROW, side=8, rank=2)
    assert own.name == "swap: bookkeeping in a step" and own.value > 0 and own.at_most == 2.0
    assert step.value > 0


def test_gpu_phase_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.measure(1) == []
    assert "no GPU here" in capsys.readouterr().err


def test_gpu_phase_on_the_cpu():
    names = ("plain", "cpu offload", "swap 26, unsloth offload", "fp8")
    cases = [case for case in gpu.ANIMA.cases if case.name in names]
    cases = [replace(case, memory={key: min(value, 2) for key, value in case.memory.items()}) for case in cases]
    subject = replace(gpu.ANIMA, config=NARROW, cases=cases)
    figures = gpu.measure(1, subjects=[subject], side=8, rank=2, device=CPU)
    assert [figure.name for figure in figures[1:-1]] == [f"gpu: step, {name}" for name in names]
    assert figures[0].name == "gpu: floor of a step" and all(figure.value > 0 for figure in figures)


def test_a_case_is_the_model_that_it_names():
    (case,) = (case for case in gpu.ANIMA.cases if case.name == "checkpointing, fp8")
    denoiser, _ = gpu.make_model(case, replace(gpu.ANIMA, config=NARROW), rank=2, device=CPU)
    assert denoiser.blocks[1].mlp.layer1.weight.dtype == torch.float8_e4m3fn
    assert denoiser.run_block is run_checkpointed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_phase_on_a_gpu():
    cases = [case for case in gpu.ANIMA.cases if not case.compiled and "swap" not in case.name]
    subject = replace(gpu.ANIMA, config=NARROW, cases=cases)
    figures = gpu.measure(1, subjects=[subject], side=8, rank=2, device=torch.device("cuda"))
    assert sum(figure.unit == "GiB" for figure in figures) == len(cases)
