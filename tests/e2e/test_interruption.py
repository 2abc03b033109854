"""Runs that are stopped or killed go on to the very same LoRA."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.kinds import CACHED, KINDS, model_flags, over, run_flags, same_lora, write_dataset

STEPS = 12


@pytest.fixture
def flags(kind, request, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(5), kind)
    fixed = [
        *model_flags(kind, request.getfixturevalue(KINDS[kind].fixture)),
        *CACHED,
        f"--max_train_steps={STEPS}",
        "--network_dropout=0.1",
        "--save_state",
        "--save_every_n_steps=2",
    ]
    return lambda output: [*fixed, *run_flags(kind, tmp_path / output, dataset)]


@pytest.fixture
def uninterrupted(run_script, kind, flags, tmp_path) -> Path:
    done = run_script(KINDS[kind].script, *flags("whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "whole" / "tiny.safetensors"


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Reads the output until ``text`` has come; fails when the process ends before."""
    seen = ""
    assert process.stdout is not None
    while text not in seen:
        piece = process.stdout.read(1)
        assert piece, f"ended before {text!r}:\n{seen}"
        seen += piece
    return seen


@over("anima", slow=("sdxl", "sd3", "lumina"))
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_saves_and_the_run_goes_on(start_script, run_script, kind, flags, uninterrupted, tmp_path, number, status):
    process = start_script(KINDS[kind].script, *flags("stopped"))
    wait_for(process, f"saved {tmp_path / 'stopped'}")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    assert "to go on:" in output and "--resume" in output and "Traceback" not in output
    done = run_script(KINDS[kind].script, *flags("stopped"), "--resume=latest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_lora(uninterrupted, tmp_path / "stopped" / "tiny.safetensors")


@over("anima")
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_run_whose_launcher_was_ended_saves_and_stops(start_script, kind, flags, tmp_path):
    process = start_script(KINDS[kind].script, *flags("orphan"), "--max_train_steps=100000", launcher=1)
    wait_for(process, f"saved {tmp_path / 'orphan'}")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)  # ends when the trainer, too, has closed the pipe
    assert "stopped after step" in output and "--resume" in output


@over("anima")
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_launcher_ended_before_training_ends_the_run(start_script, kind, flags, tmp_path):
    process = start_script(KINDS[kind].script, *flags("early"), "--max_train_steps=100000", launcher=1)
    wait_for(process, "plan for")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # ends when the trainer, too, has closed the pipe
    assert "training is done" not in output


@over(slow=("anima", "sd3", "lumina"))
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ten_kills_at_random_moments(start_script, run_script, kind, flags, uninterrupted, tmp_path):
    chance = random.Random(11)
    output = tmp_path / "killed"
    for _ in range(10):
        process = start_script(KINDS[kind].script, *flags("killed"), "--resume=latest")
        wait_for(process, "plan for")
        time.sleep(chance.uniform(0.5, 4.0))  # from caching to the last save
        process.kill()
        process.wait()
        if (output / "tiny-state").is_dir():
            break
    if not (output / "tiny-state").is_dir():
        done = run_script(KINDS[kind].script, *flags("killed"), "--resume=latest")
        assert done.returncode == 0, done.stdout + done.stderr
    assert same_lora(uninterrupted, output / "tiny.safetensors")
