"""sd3_minimal_inference.py and lumina_minimal_inference.py as real processes: pictures of a training, also of prompts typed in."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.conftest import script_command
from tests.e2e.kinds import CACHED, model_flags, over, run_flags, write_dataset
from tests.e2e.test_anima_inference import levels

# script, its names of the flags of training, and what makes it compute in float32 on the CPU
SCRIPTS = {
    "sd3": ("sd3_minimal_inference.py", {"--pretrained_model_name_or_path": "--ckpt_path"}, ("--mixed_precision=no",)),
    "lumina": (
        "lumina_minimal_inference.py",
        {"--gemma2": "--gemma2_path", "--ae": "--ae_path"},
        ("--dtype=fp32", "--gemma2_dtype=fp32", "--ae_dtype=fp32"),
    ),
}
PROMPT = "a red house --n rain --w 64 --h 96 --d 11 --s 5 --l 4 --fs 3"


@pytest.fixture
def flags_of(request):
    """``flags_of("sd3")``: the tiny models, as the drawing script's command line names them."""

    def flags(kind: str) -> list[str]:
        _, names, precision = SCRIPTS[kind]
        pairs = (flag.split("=", 1) for flag in model_flags(kind, request.getfixturevalue(f"tiny_{kind}")))
        return [*(f"{names.get(flag, flag)}={value}" for flag, value in pairs), *precision, "--device=cpu"]

    return flags


@over(slow=("sd3", "lumina"))
def test_samples_of_a_training_come_out_again(run_script, request, flags_of, picture_folder, tmp_path, kind):
    """Bit by bit: the LoRA is beside the weights, as while training."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n")
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2), kind)
    training = [*model_flags(kind, request.getfixturevalue(f"tiny_{kind}")), *run_flags(kind, tmp_path / "trained", dataset),
                *CACHED, f"--sample_prompts={prompts}", "--sample_at_first", "--sample_every_n_steps=2",
                "--sample_sampler=er_sde", "--max_train_steps=2", "--learning_rate=0.02"]  # fmt: skip
    done = run_script(f"{kind}_train_network.py", *training)
    assert done.returncode == 0, done.stderr
    samples = sorted((tmp_path / "trained" / "sample").glob("*.png"))
    first, trained = (next(path for path in samples if mark in path.name) for mark in ("_e000000_", "_000002_"))
    script = SCRIPTS[kind][0]
    done = run_script(script, *flags_of(kind), f"--from_file={prompts}", "--sampler=er_sde", f"--output_dir={tmp_path / 'out'}",
                      "--lora_weights", tmp_path / "trained" / "tiny.safetensors")  # fmt: skip
    assert done.returncode == 0 and "1 picture in" in done.stdout, (done.stdout, done.stderr)
    (again,) = (tmp_path / "out").glob("*.png")
    assert np.array_equal(levels(again), levels(trained)) and np.abs(levels(again) - levels(first)).max() > 1
    with Image.open(again) as drawn, Image.open(trained) as sample:
        assert drawn.text["parameters"].startswith(sample.text["parameters"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTS)
def test_lines_from_the_console(script_environment, flags_of, tmp_path, kind):
    flags = [*flags_of(kind), f"--output_dir={tmp_path / 'out'}", "--interactive", "--steps=2"]
    done = subprocess.run(
        script_command(SCRIPTS[kind][0], *flags), cwd=tmp_path, env=script_environment, capture_output=True, text=True,
        input=f"{PROMPT}\na house --q 1\n{PROMPT}\nquit\n",
    )  # fmt: skip
    assert done.returncode == 0 and "--q is not a flag" in done.stderr and "2 pictures in" in done.stdout, done.stderr
    first, second = (tmp_path / "out").glob("*.png")
    assert np.array_equal(levels(first), levels(second))
