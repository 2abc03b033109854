"""sd_minimal_inference.py and sdxl_minimal_inference.py as real processes: mistakes at once, pictures, prompts from the console."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY, script_command

SMALL = ["--image_size", "64", "64", "--infer_steps=2", "--device=cpu"]


@pytest.mark.parametrize("script", ["sd_minimal_inference.py", "sdxl_minimal_inference.py"])
def test_help_and_mistakes_end_at_once(run_script, tmp_path, script):
    done = run_script(script, "--help")
    assert done.returncode == 0 and "--lora_weights" in done.stdout and "dpmsolver++" in done.stdout
    done = run_script(
        script, "--ckpt_path=missing.safetensors", "--lora_weights", "gone.safetensors;2", f"--output_dir={tmp_path}"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--ckpt_path missing.safetensors does not exist" in done.stderr and "gone.safetensors" in done.stderr


@pytest.mark.parametrize("script", ["sd_minimal_inference", "sdxl_minimal_inference"])
def test_checks_need_no_torch(script):
    """What the script imports before it has checked its command line."""
    source = (REPOSITORY / f"{script}.py").read_text(encoding="utf-8")
    start = source[: source.index('if __name__ == "__main__":  # before torch')]
    code = f"{start}\nimport sys\nsys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


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
    assert pixels(again) == pixels(first)


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()
