"""Stable Diffusion 1, 2 and XL from the command line to the files they leave, as real processes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from library.files.safetensors_file import read_header
from tests.e2e.sd_runs import CACHED, SCRIPTS, lora, model_flags, run_flags, same_lora, write_dataset


@pytest.fixture
def dataset(picture_folder, tmp_path) -> Path:
    return write_dataset(tmp_path / "my.toml", picture_folder(5))


VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
A_MODULE = {
    "sd1": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "sd2": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "sdxl": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
}


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_the_usual_command(run_script, tiny_sd, dataset, tmp_path, kind):
    """With what people of the reference have in their commands: half precision, a text encoder, convolutions, samples, states."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (red:1.2) square --w 64 --h 64 --s 2 --d 1 --n blurry\nanother --w 64 --h 72 --s 2 --ss euler_a\n")
    done = run_script(
        SCRIPTS[kind], *model_flags(kind, tiny_sd), f"--dataset_config={dataset}", f"--output_dir={tmp_path / 'out'}",
        "--output_name=mine", "--save_model_as=safetensors", "--network_module=networks.lora", "--network_dim=8",
        "--network_alpha=4", "--network_args", "conv_dim=4", "conv_alpha=1", "--learning_rate=1e-4", "--text_encoder_lr=5e-5",
        "--unet_lr=1e-4", "--optimizer_type=AdamW8bit", "--lr_scheduler=cosine", "--max_train_epochs=2", "--save_every_n_epochs=1",
        "--mixed_precision=bf16", "--save_precision=fp16", "--gradient_checkpointing", "--cache_latents_to_disk", "--sdpa",
        "--noise_offset=0.0357", "--min_snr_gamma=5", "--seed=3", f"--sample_prompts={prompts}", "--sample_every_n_epochs=1",
        f"--logging_dir={tmp_path / 'logs'}", "--save_state", "--no_half_vae", launcher=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["mine-000001-state", "mine-000001.safetensors", "mine-state", "mine.safetensors", "sample"]
    header = read_header(tmp_path / "out" / "mine.safetensors")
    assert header.tensors[f"{A_MODULE[kind]}.lora_down.weight"].dtype == "F16"
    assert header.metadata["ss_base_model_version"] == VERSIONS[kind] and header.metadata["sshs_model_hash"]
    assert header.metadata["ss_v2"] == str(kind == "sd2") and header.metadata["modelspec.prediction_type"] == "epsilon"
    pictures = sorted((tmp_path / "out" / "sample").iterdir())
    assert [re.sub(r"\d{14}", "T", path.name) for path in pictures] == [
        f"mine_e{epoch:06d}_{end}" for epoch in (1, 2) for end in ("00_T_1.png", "01_T.png")
    ]
    assert [Image.open(path).size for path in pictures] == [(64, 64), (64, 72)] * 2
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(run_script, tiny_sd, picture_folder, tmp_path):
    images = picture_folder(6)
    one = write_dataset(tmp_path / "one.toml", images, batch_size=2)
    two = write_dataset(tmp_path / "two.toml", images, batch_size=1)
    flags = [*model_flags("sd1", tiny_sd), "--cache_latents_to_disk", "--max_train_steps=4", "--noise_offset=0.1"]
    single = run_script(SCRIPTS["sd1"], *flags, *run_flags(tmp_path / "single", one))
    assert single.returncode == 0, single.stderr
    pair = run_script(SCRIPTS["sd1"], *flags, *run_flags(tmp_path / "pair", two), launcher=2)
    assert pair.returncode == 0, pair.stdout + pair.stderr
    a, b = lora(tmp_path / "single" / "tiny.safetensors"), lora(tmp_path / "pair" / "tiny.safetensors")
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 2e-6 + 1e-3 * a[name].abs().max(), name


@pytest.mark.slow  # the same way as Anima's, whose test runs always
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_saves_and_the_run_goes_on(start_script, run_script, tiny_sd, dataset, tmp_path):
    fixed = [*model_flags("sdxl", tiny_sd), *CACHED, "--max_train_steps=12", "--save_state", "--save_every_n_steps=2"]
    whole = run_script(SCRIPTS["sdxl"], *fixed, *run_flags(tmp_path / "whole", dataset))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    process: subprocess.Popen[str] = start_script(SCRIPTS["sdxl"], *fixed, *run_flags(tmp_path / "stopped", dataset))
    seen = ""
    assert process.stdout is not None
    while f"saved {tmp_path / 'stopped'}" not in seen:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in output and "Traceback" not in output, output
    done = run_script(SCRIPTS["sdxl"], *fixed, *run_flags(tmp_path / "stopped", dataset), "--resume=latest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_lora(tmp_path / "whole" / "tiny.safetensors", tmp_path / "stopped" / "tiny.safetensors")


def test_warm_caches_need_no_encoder(run_script, tiny_sd, dataset, tmp_path):
    flags = [*model_flags("sdxl", tiny_sd), *CACHED, "--max_train_steps=2"]
    cold = run_script(SCRIPTS["sdxl"], *flags, *run_flags(tmp_path / "cold", dataset))
    assert cold.returncode == 0, cold.stderr
    warm = run_script(
        SCRIPTS["sdxl"], *flags, *run_flags(tmp_path / "warm", dataset), environment={"PYTHONPROFILEIMPORTTIME": "1"}
    )
    assert warm.returncode == 0, warm.stderr
    assert "5 of 5 cached" in warm.stdout
    assert "transformers.models.clip.modeling_clip" not in warm.stderr
    assert same_lora(tmp_path / "cold" / "tiny.safetensors", tmp_path / "warm" / "tiny.safetensors")
