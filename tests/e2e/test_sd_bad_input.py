"""What goes wrong with Stable Diffusion's checkpoints and flags: each ends in one message with what, where and what to do; status 2,
no traceback."""

from __future__ import annotations

import os

import pytest
import torch

from tests.e2e.sd_runs import run_flags, write_dataset

SD, XL = "train_network.py", "sdxl_train_network.py"


@pytest.fixture
def attempt(run_script, picture_folder, tmp_path):
    """``attempt(script, *flags)`` returns the one error block of a run."""
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2))

    def run(script: str, *flags: object) -> str:
        done = run_script(script, *run_flags(tmp_path / "out", dataset), "--max_train_steps=1", *flags, timeout=120)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done.stderr
        return done.stderr

    return run


@pytest.mark.parametrize(
    ("script", "model", "flags", "told"),
    [
        (SD, "sd2", "", "is a Stable Diffusion 2.x checkpoint: add --v2"),
        (SD, "sd1_folder", "--v2", "is a Stable Diffusion 1.x checkpoint, but --v2 says 2.x: drop --v2"),
        (SD, "sdxl_folder", "", "is an SDXL checkpoint (sdxl_train_network.py trains those)"),
        (XL, "sd2", "", "is a Stable Diffusion 2.x checkpoint (train_network.py --v2 trains those)"),
        (SD, "dit", "", "is an Anima DiT (anima_train_network.py trains those)"),
        (SD, "vae", "", "is a Stable Diffusion VAE"),
        (SD, "sd1_folder", "--v_parameterization", "predicts noise (epsilon) according to its scheduler/scheduler_config.json"),
        (SD, "sd1", "--clip_skip=99", "--clip_skip is 99, but the text encoder has 3 layers"),
        (SD, "sd1", "--scale_v_pred_loss_like_noise_pred", "needs --v_parameterization"),
        (SD, "sd1", "--sample_sampler=euler_aa", "(did you mean euler_a?)"),
        (XL, "sdxl", "--network_args block_dims=1,2,3", "block_dims has 3 values, and this U-Net has 23 blocks"),
    ],
)
def test_models_and_flags_that_do_not_fit(attempt, tiny_sd, tiny_anima, script, model, flags, told):
    path = {**tiny_sd, **tiny_anima, "vae": tiny_sd["vae"]}[model]
    assert told in attempt(script, f"--pretrained_model_name_or_path={path}", *flags.split())


def test_anima_s_script_names_the_right_one(run_script, tiny_sd, tiny_anima, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2))
    flags = [*run_flags(tmp_path / "out", dataset), f"--qwen3={tiny_anima['qwen3']}", f"--vae={tiny_anima['vae']}"]
    done = run_script("anima_train_network.py", *flags, f"--pretrained_model_name_or_path={tiny_sd['sdxl']}", timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is an SDXL checkpoint (sdxl_train_network.py trains those), not an Anima DiT" in done.stderr


class Harmful:
    """Makes a folder when it is unpickled as usual."""

    def __init__(self, folder: object):
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_pickles_that_are_damaged_or_hold_code(attempt, tiny_sd, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(tiny_sd["sd1_ckpt"].read_bytes()[:-1000])
    assert "is damaged" in attempt(SD, f"--pretrained_model_name_or_path={cut}")
    harmful, made = tmp_path / "harmful.ckpt", tmp_path / "made"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "more": Harmful(made)}, harmful)
    message = attempt(SD, f"--pretrained_model_name_or_path={tiny_sd['sd1']}", f"--vae={harmful}")
    assert f"--vae {harmful} holds more than weights" in message and "nothing ran" in message
    assert not made.exists()
