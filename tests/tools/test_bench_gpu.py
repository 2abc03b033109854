"""The benchmark's phases about the GPU, on tiny models on the CPU: what all models that it counts have in common. No times are
judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from library.nn.checkpointing import run_checkpointed
from tests.library.lumina.tiny_nextdit import TINY as NEXTDIT
from tests.library.sd.tiny_unets import SDXL
from tests.library.sd3.tiny_mmdit import KINDS
from tools import bench
from tools.bench_parts import gpu, gpu_dits
from tools.bench_parts.flops import counted_flops

CPU = torch.device("cpu")
SUBJECTS = {subject.label.strip(): subject for subject in (gpu.SDXL, *gpu_dits.SUBJECTS)}
TINY = {
    "SDXL": SDXL,
    "SD3-medium": KINDS["medium"],
    "SD3.5-medium": KINDS["5-medium"],
    "SD3.5-large": KINDS["5-large"],
    "Lumina": NEXTDIT,
}
PARAMETERS = {
    "SDXL": 2_567_463_684,
    "SD3-medium": 2_028_328_000,
    "SD3.5-medium": 2_243_171_520,
    "SD3.5-large": 8_056_627_520,
    "Lumina": 2_609_769_152,
}
every = pytest.mark.parametrize("label", SUBJECTS)
lumina = pytest.mark.parametrize(
    "label", [pytest.param(label, marks=() if label == "Lumina" else pytest.mark.slow) for label in SUBJECTS]
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(gpu, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(gpu, "STEPS_IN_A_ROW", 1)


def tiny(label: str, *names: str) -> gpu.Subject:
    """With the cases of these names."""
    cases = [case for case in SUBJECTS[label].cases if case.name in names]
    assert len(cases) == len(names)
    return replace(SUBJECTS[label], config=TINY[label], cases=cases or SUBJECTS[label].cases)


@every
def test_the_model_has_the_published_sizes(label):
    subject = SUBJECTS[label]
    assert sum(weight.numel() for weight in subject.build(subject.config).parameters()) == PARAMETERS[label]


@lumina
def test_what_is_counted_without_computing_is_what_a_step_computes(label):
    subject = tiny(label, "eager")
    step = gpu.training_step(subject.cases[0], subject, side=16, rank=2, device=CPU)
    computed = counted_flops(step.forward_and_backward)
    assert gpu.flops_of(subject, side=16, rank=2) == computed > 0


@lumina
def test_the_cases_that_run_anywhere(label):
    names = ("eager", "checkpointing", "fp8", "checkpointing, fp8")
    figures = gpu.measure(1, subjects=[tiny(label, *names)], side=8, rank=2, device=CPU)
    found = [figure.name for figure in figures]
    assert found[: len(names) + 2] == [
        f"gpu: {label} floor of a step",
        *(f"gpu: {label} step, {name}" for name in names),
        f"gpu: {label} fastest step",
    ]
    assert all(figure.value > 0 for figure in figures)


FP8_LAYER = {
    "SDXL": "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "SD3-medium": "joint_blocks.0.context_block.mlp.fc1",
    "SD3.5-medium": "joint_blocks.0.x_block.attn2.qkv",
    "SD3.5-large": "joint_blocks.0.x_block.adaLN_modulation.1",
    "Lumina": "layers.1.feed_forward.w3",
}


@every
def test_a_case_is_the_model_that_it_names(label):
    subject = tiny(label, "checkpointing, fp8")
    denoiser, network = gpu.make_model(subject.cases[0], subject, rank=2, device=CPU)
    weights = denoiser.state_dict()
    assert weights[f"{FP8_LAYER[label]}.weight"].dtype == torch.float8_e4m3fn
    assert torch.bfloat16 in {weight.dtype for weight in weights.values()}
    assert denoiser.run_block is run_checkpointed
    assert {module.lora_dim for module in network.unet_loras} == {2}


def test_swapping_leaves_blocks_on_the_device():
    for subject in gpu_dits.SUBJECTS:
        swapped = [case.memory["blocks_to_swap"] for case in subject.cases if "blocks_to_swap" in case.memory]
        assert swapped == [subject.config.blocks // 2, subject.config.blocks - 2]


@pytest.mark.slow  # half a minute of counting
@pytest.mark.parametrize(
    ("label", "tera"), [("SD3-medium", 20.92), ("SD3.5-medium", 27.0), ("SD3.5-large", 70.08), ("Lumina", 51.11)]
)
def test_the_real_models_step(label, tera):
    assert gpu.flops_of(SUBJECTS[label], 128, 16) == pytest.approx(tera * 1e12, rel=0.01)


@pytest.mark.parametrize("phase", bench.ON_GPU)
def test_only_a_phase_alone_sees_the_gpu(phase, monkeypatch):
    seen: list[Any] = []

    def noted(name: str, **how: Any) -> list[Any]:
        seen.append(bench.os.environ.get("CUDA_VISIBLE_DEVICES"))
        return []

    monkeypatch.setattr(bench, "run_phase", noted)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bench.main([phase])
    bench.main([phase, "step"])
    assert seen == ["0", "", ""]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("label", "name"), [(label, case.name) for label in SUBJECTS for case in SUBJECTS[label].cases])
def test_every_case_on_a_gpu(label, name):
    subject = tiny(label, name)
    if "blocks_to_swap" in subject.cases[0].memory:
        case = subject.cases[0]
        subject = replace(subject, cases=[replace(case, memory={**case.memory, "blocks_to_swap": 1})],
                          config=replace(subject.config, blocks=max(subject.config.blocks, 4)))  # fmt: skip
    figures = gpu.measure(1, subjects=[subject], side=16, rank=2, device=torch.device("cuda"))
    assert [figure.unit for figure in figures[1:3]] == ["ms", "GiB"] and figures[1].value > 0
