"""The benchmark: its table, its ways of measuring, and its cheapest phases on the smallest sizes. No times are judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.anima.layout import DenoiserConfig
from tools import bench
from tools.bench_parts import load, lora, startup, step, vae
from tools.bench_parts.figures import Figure, Pairs, alternate, table
from tools.bench_parts.processes import checked, run_measured

REPOSITORY = Path(__file__).resolve().parents[2]
NARROW = DenoiserConfig(width=32, blocks=1, heads=2, head_dim=16, mlp_hidden=64, adaln_dim=8, context_dim=16, adapter=None)
MIB = 2**20


@pytest.mark.parametrize(
    ("limits", "value", "verdict"),
    [
        ({"at_most": 1.5}, 1.5, "ok"),
        ({"at_most": 1.5}, 1.51, "over"),
        ({"at_least": 4.0}, 4.0, "ok"),
        ({"at_least": 4.0}, 3.9, "under"),
        ({}, 7.0, ""),
    ],
)
def test_verdicts(limits, value, verdict):
    assert Figure(name="a", value=value, unit="x", **limits).verdict == verdict


def test_the_table_is_markdown_with_one_row_a_figure():
    lines = table([Figure(name="a", value=1.234, unit="x", at_most=1.5, how="b"), Figure(name="long", value=20, unit="/s")])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    assert rows[0] == ["figure", "measured", "target", "", "how"]
    assert rows[2] == ["a", "1.23 x", "<= 1.5 x", "ok", "b"]
    assert rows[3] == ["long", "20 /s", "", "", ""]
    assert len({len(line) for line in lines.splitlines()}) == 1


def test_two_things_are_measured_in_turn_and_compared_pair_by_pair():
    calls: list[str] = []

    def measurement(name: str, values: list[float]):
        def measured() -> float:
            calls.append(name)
            return values[calls.count(name) - 1]

        return measured

    pairs = alternate(measurement("a", [2.0, 9.0, 8.0]), measurement("b", [1.0, 3.0, 2.0]), repeats=3, warm_up=False)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert pairs == Pairs([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    assert pairs.ratio == 3.0


def test_a_process_is_measured():
    code = "import sys; sum(range(3_000_000)); print('ready now'); print('done', file=sys.stderr); sys.exit(3)"
    usage = run_measured([sys.executable, "-c", code], awaited="ready")
    assert usage.status == 3
    assert usage.output.splitlines() == ["ready now", "done"]
    assert usage.said_s is not None and 0 < usage.cpu_s < 30
    with pytest.raises(RuntimeError, match="status 3"):
        checked(usage)


def test_peak_memory_counts_what_is_gone_and_not_the_parents():
    report = "from tools.bench_parts.processes import *; print(peak_resident_bytes() - resident_bytes())"
    held = bytearray(b"x") * (256 * MIB)  # the process that is started inherits nothing of it
    small = int(checked(run_measured([sys.executable, "-c", report])).output)
    large = int(checked(run_measured([sys.executable, "-c", f"bytearray(b'x') * {64 * MIB}; {report}"])).output)
    assert len(held) == 256 * MIB
    assert small < 32 * MIB < large < 128 * MIB


def test_startup_answers():
    found = startup.answers(1)
    assert [figure.name for figure in found] == ["startup: --help", "startup: a mistyped flag"]
    assert all(figure.value > 0 for figure in found)


def test_lora_phase():
    (figure,) = lora.measure(1, config=NARROW, side=8, rank=2)
    assert figure.name == "LoRA r2 step / no LoRA" and figure.value > 0


def test_the_compared_denoisers_agree_until_the_lora_learns():
    plain, adapted = lora.twins(NARROW)
    inputs = lora.make_inputs(NARROW, 8)
    train = lora.lora_step(adapted, inputs, 2)
    before = plain(*inputs)
    assert torch.allclose(adapted(*inputs), before, atol=1e-6)  # lora_up is zero
    for _ in range(3):
        train()
    assert not torch.equal(adapted(*inputs), before)
    assert torch.equal(plain(*inputs), before)


@pytest.mark.slow
def test_load_phase():
    found = load.measure(
        1,
        dit_sizes={"width": 32, "blocks": 1, "heads": 2, "head_dim": 16, "mlp_hidden": 64},
        qwen3_sizes={"width": 16, "blocks": 1},
        sdxl_size="tiny",
        sd3_size="tiny",
        lumina_size="tiny",
    )
    names = [figure.name.split(",")[0] for figure in found]
    assert names == [f"load: {kind}" for kind in ("dit", "qwen3", "sd3", "lumina", "sdxl")]
    assert all(figure.value < 1000 for figure in found)


@pytest.mark.slow
def test_vae_phase():
    pytest.importorskip("diffusers")
    speed, difference = vae.measure(1, width=8, side=32)
    assert speed.value > 0
    assert difference.verdict == "ok"


@pytest.mark.parametrize("kind", ["anima", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "sd3", "lumina"))])
def test_step_phase(kind):
    (figure,) = step.measure(1, cases=[step.Case(images=2, resolution=64, pairs=2, kind=kind)])
    assert figure.name == f"step: own work, {kind}, 2 x 64 px" and figure.value < 100


def test_cache_phase_sees_work_only_in_the_cold_start():
    from tools.bench_parts import cache

    warm_calls, per_call, speed, _ = cache.measure(1, pictures=3, resolution=64)
    assert warm_calls.value == 0
    assert 1 <= per_call.value <= cache.BATCH
    assert speed.value > 0


def test_a_phase_that_fails_leaves_the_others(capsys, monkeypatch):
    monkeypatch.setattr(lora, "measure", lambda repeats: 1 / 0)
    monkeypatch.setattr(startup, "measure", lambda repeats: [Figure(name="here", value=repeats, unit="x")])
    for name in ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "")  # main() sets them; the next test gets back what was there
    threads = torch.get_num_threads()
    assert bench.main(["lora", "startup", "--repeats", "3", "--threads", str(threads)]) == 1
    captured = capsys.readouterr()
    assert "| here   | 3 x" in captured.out
    assert "ZeroDivisionError" in captured.err and "not measured: lora" in captured.err


@pytest.mark.parametrize("arguments", [["lora", "speed"], [""], ["--repeats", "0"]])
def test_mistakes_in_the_flags_end_with_status_2(arguments):
    result = subprocess.run([sys.executable, "tools/bench.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert arguments[0] in result.stderr
