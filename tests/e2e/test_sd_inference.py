"""sd_minimal_inference.py and sdxl_minimal_inference.py as real processes: pictures, prompts from the console; and of all scripts
with the same flags for LoRA files: help and mistakes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY, script_command
from tests.e2e.sd_runs import SCRIPTS, VERSION_FLAGS, model_flags, run_flags, write_dataset

SMALL = ["--image_size", "64", "64", "--infer_steps=2", "--device=cpu"]


@pytest.mark.parametrize(
    ("script", "flag", "sampler"),
    [
        ("sd_minimal_inference.py", "--ckpt_path", "dpmsolver++"),
        ("sdxl_minimal_inference.py", "--ckpt_path", "dpmsolver++"),
        ("sd3_minimal_inference.py", "--ckpt_path", "er_sde"),
        ("lumina_minimal_inference.py", "--pretrained_model_name_or_path", "er_sde"),
    ],
)
def test_help_and_mistakes_end_at_once(run_script, tmp_path, script, flag, sampler):
    done = run_script(script, "--help")
    assert done.returncode == 0 and "--lora_weights" in done.stdout and sampler in done.stdout
    done = run_script(script, f"{flag}=missing.safetensors", "--lora_weights", "gone.safetensors;2", f"--output_dir={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert f"{flag} missing.safetensors does not exist" in done.stderr and "gone.safetensors" in done.stderr


@pytest.mark.parametrize(
    "script", ["sd_minimal_inference", "sdxl_minimal_inference", "sd3_minimal_inference", "lumina_minimal_inference"]
)
def test_checks_need_no_torch(script):
    """What the script imports before it has checked its command line."""
    source = (REPOSITORY / f"{script}.py").read_text(encoding="utf-8")
    start = source[: source.index('if __name__ == "__main__":  # before torch')]
    code = f"{start}\nimport sys\nsys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.slow
def test_a_file_of_prompts_and_one_from_the_console(tiny_sd, run_script, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house --d 5 --p2 fog\na dog --d 6 --ss ddim --w 96 --n rain\n")
    common = [f"--ckpt_path={tiny_sd['sdxl']}", f"--output_dir={tmp_path / 'out'}", *SMALL]
    done = run_script("sdxl_minimal_inference.py", *common, f"--from_file={prompts}")
    assert done.returncode == 0 and "2 pictures in" in done.stdout, (done.stdout, done.stderr)
    first, second = sorted((tmp_path / "out").glob("image_*_00?.png"))
    with Image.open(first) as picture:
        assert "Prompt 2: fog" in picture.text["parameters"] and picture.size == (64, 64)
    with Image.open(second) as picture:
        assert "Negative prompt: rain" in picture.text["parameters"] and picture.size == (96, 64)
    command = script_command("sdxl_minimal_inference.py", *common, "--interactive")
    typed = "a red house --d 5 --p2 fog\na --ss nothing\n"
    done = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and "--ss nothing is no sampler here" in done.stderr, (done.stdout, done.stderr)
    (again,) = set((tmp_path / "out").glob("*.png")) - {first, second}
    assert np.array_equal(levels(again), levels(first))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl"])
def test_samples_of_a_training_come_out_again(run_script, tiny_sd, picture_folder, tmp_path, kind):
    """The base model's sample bit by bit; that of the trained LoRA, which acts beside the weights there, up to rounding."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (red:1.3) house --n rain --w 64 --h 72 --d 11 --s 4 --l 4 --ss euler_a\n")
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2))
    training = [*model_flags(kind, tiny_sd), *run_flags(tmp_path / "trained", dataset), f"--sample_prompts={prompts}",
                "--cache_latents", "--sample_at_first", "--sample_every_n_steps=2", "--max_train_steps=2",
                "--learning_rate=0.02"]  # fmt: skip
    done = run_script(SCRIPTS[kind], *training)
    assert done.returncode == 0, done.stderr
    samples = sorted((tmp_path / "trained" / "sample").glob("*.png"))
    first, trained = (next(path for path in samples if mark in path.name) for mark in ("_e000000_", "_000002_"))
    with Image.open(first) as picture:
        assert picture.text["parameters"] == (
            "a (red:1.3) house\nNegative prompt: rain\nSteps: 4, Sampler: euler_a, CFG scale: 4, Seed: 11, Size: 64x72"
        )
    common = [
        f"--ckpt_path={tiny_sd[kind]}",
        *VERSION_FLAGS[kind],
        f"--from_file={prompts}",
        "--mixed_precision=no",
        "--device=cpu",
    ]
    for name, flags in (("base", []), ("lora", ["--lora_weights", tmp_path / "trained" / "tiny.safetensors"])):
        script = "sdxl_minimal_inference.py" if kind == "sdxl" else "sd_minimal_inference.py"
        done = run_script(script, *common, f"--output_dir={tmp_path / name}", *flags)
        assert done.returncode == 0 and "1 picture in" in done.stdout, (done.stdout, done.stderr)
    (base,), (lora,) = ((tmp_path / name).glob("*.png") for name in ("base", "lora"))
    assert np.array_equal(levels(base), levels(first))
    assert np.abs(levels(lora) - levels(trained)).max() <= 1 < np.abs(levels(lora) - levels(base)).max()


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)
