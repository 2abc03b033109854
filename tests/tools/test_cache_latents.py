"""tools/cache_latents.py as a real process on the tiny model."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from tests.e2e.anima_runs import write_dataset

TOOL = "tools/cache_latents.py"


@pytest.fixture
def dataset(picture_folder, tmp_path):
    return write_dataset(tmp_path / "my.toml", picture_folder(5))


def cached(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*-latents.safetensors")}


def test_latents_are_cached_with_nothing_but_the_vae_by_one_process_or_two(run_script, tiny_anima, dataset, tmp_path):
    flags = ["--anima", f"--dataset_config={dataset}", f"--vae={tiny_anima['vae']}"]
    done = run_script(TOOL, *flags, launcher=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 5 cached on disk, 5 missing" in done.stdout and "all 5 latents are on disk, 5 of them made now" in done.stdout
    done = run_script(TOOL, *flags, f"--cache_dir={tmp_path / 'two'}", launcher=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all 5 latents are on disk, 5 of them made now") == 1
    alone, together = cached(tmp_path / "pictures"), cached(tmp_path / "two")
    assert len(alone) == 5 and sorted(alone.values()) == sorted(together.values())


def test_mistakes_and_help(run_script, dataset):
    done = run_script(TOOL, f"--dataset_config={dataset}")
    assert done.returncode == 2 and "--pretrained_model_name_or_path is missing" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_script(TOOL, "--anima", f"--dataset_config={dataset}", "--vea=x")
    assert done.returncode == 2 and "did you mean --vae?" in done.stderr
    done = run_script(TOOL, "--help")
    assert done.returncode == 0 and "--skip_existing" in done.stdout and "--dataset_config" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_what_is_made(start_script, run_script, tiny_anima, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "many.toml", picture_folder(24, scale=0.5), resolution=256)
    flags = ["--anima", f"--dataset_config={dataset}", f"--vae={tiny_anima['vae']}"]
    process = start_script(TOOL, *flags)
    deadline = time.monotonic() + 60
    while not cached(tmp_path / "pictures") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("all was cached before the signal came")
    assert process.returncode == 130 and "goes on from what is saved and cached" in output, output
    made = cached(tmp_path / "pictures")
    done = run_script(TOOL, *flags)
    assert done.returncode == 0 and f"{len(made)} of 24 cached on disk" in done.stdout, done.stdout + done.stderr
    assert made.items() <= cached(tmp_path / "pictures").items() and len(cached(tmp_path / "pictures")) == 24
