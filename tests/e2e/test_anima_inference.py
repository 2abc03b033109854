"""anima_minimal_inference.py as a real process: pictures of a training, mistakes, and prompts from the console."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import heed_ctrl_c, script_command
from tests.e2e.anima_runs import CACHED, model_flags, run_flags, write_dataset

SCRIPT = "anima_minimal_inference.py"


def inference_flags(tiny_anima: dict[str, Path], output: Path) -> list[str]:
    files = {"dit": "dit", "text_encoder": "qwen3", "vae": "vae"}
    return [*(f"--{flag}={tiny_anima[name]}" for flag, name in files.items()), f"--save_path={output}"]


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_samples_of_a_training_come_out_again(run_script, tiny_anima, picture_folder, tmp_path):
    """The base model's sample bit by bit; that of the trained LoRA, which acts beside the weights there, up to rounding."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house --n rain --w 64 --h 96 --d 11 --s 5 --l 4 --fs 3\n")
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2))
    training = [*model_flags(tiny_anima), *run_flags(tmp_path / "trained", dataset), *CACHED, f"--sample_prompts={prompts}",
                "--sample_at_first", "--sample_every_n_steps=2", "--sample_sampler=er_sde", "--max_train_steps=2",
                "--learning_rate=0.02"]  # fmt: skip
    done = run_script("anima_train_network.py", *training)
    assert done.returncode == 0, done.stderr
    samples = sorted((tmp_path / "trained" / "sample").glob("*.png"))
    first, trained = (next(path for path in samples if mark in path.name) for mark in ("_e000000_", "_000002_"))

    with Image.open(first) as picture:
        assert picture.text["parameters"] == (
            "a red house\nNegative prompt: rain\nSteps: 5, Sampler: er_sde, CFG scale: 4, Seed: 11, Shift: 3, Size: 64x96"
        )

    common = [f"--from_file={prompts}", "--sampler=er_sde", "--mixed_precision=no", "--device=cpu"]
    for name, flags in (("base", []), ("lora", ["--lora_weight", tmp_path / "trained" / "tiny.safetensors"])):
        done = run_script(SCRIPT, *inference_flags(tiny_anima, tmp_path / name), *common, *flags)
        assert done.returncode == 0 and "1 picture in" in done.stdout, (done.stdout, done.stderr)
    (base,), (lora,) = ((tmp_path / name).glob("*_11.png") for name in ("base", "lora"))
    assert np.array_equal(levels(base), levels(first))
    assert np.abs(levels(lora) - levels(trained)).max() <= 1 < np.abs(levels(lora) - levels(base)).max()


def test_help_and_mistakes_end_at_once(run_script, tiny_anima, tmp_path):
    done = run_script(SCRIPT, "--help")
    assert done.returncode == 0 and "--lora_weight" in done.stdout and "er_sde" in done.stdout
    flags = inference_flags({**tiny_anima, "dit": tiny_anima["dit"].with_name("anima_tinny.safetensors")}, tmp_path / "out")
    done = run_script(SCRIPT, *flags, "--prompt=a cat", "--infer_steps=4", "--lora_weight", "nowhere.safetensors")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done.stderr
    assert "--dit" in done.stderr and "did you mean anima_tiny.safetensors" in done.stderr and "nowhere" in done.stderr
    done = run_script(SCRIPT, *flags, "--promt=a cat")
    assert done.returncode == 2 and "did you mean --prompt" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_lines_from_the_console_and_ctrl_c(script_environment, tiny_anima, tmp_path):
    flags = [*inference_flags(tiny_anima, tmp_path / "out"), "--interactive", "--infer_steps=2", "--image_size", 64, 64]
    process = subprocess.Popen(
        script_command(SCRIPT, *flags), cwd=tmp_path, env=script_environment, text=True, encoding="utf-8", preexec_fn=heed_ctrl_c,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write("a house --d 3 --q 1\na house --d 3\n")
        process.stdin.flush()
        end = time.monotonic() + 120
        while not list((tmp_path / "out").glob("*_3.png")) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
        time.sleep(0.5)  # it waits for the next line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert len(list((tmp_path / "out").glob("*_3.png"))) == 1
    assert process.returncode == 130 and "--q is not a flag" in errors and "Traceback" not in errors, errors


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("script", [SCRIPT, "anima_train_network.py"])
def test_ctrl_c_while_modules_are_imported(script, script_environment, tiny_anima, picture_folder, tmp_path):
    """In place of torch a module that is interrupted."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    paths = os.pathsep.join([str(tmp_path / "first"), script_environment.get("PYTHONPATH", "")])
    flags = [*inference_flags(tiny_anima, tmp_path / "out"), "--prompt=a cat"]
    if script != SCRIPT:
        dataset = write_dataset(tmp_path / "my.toml", picture_folder(2))
        flags = [*model_flags(tiny_anima), *run_flags(tmp_path / "out", dataset)]
    done = subprocess.run(
        script_command(script, *flags), cwd=tmp_path, env={**script_environment, "PYTHONPATH": paths}, text=True,
        encoding="utf-8", preexec_fn=heed_ctrl_c, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
