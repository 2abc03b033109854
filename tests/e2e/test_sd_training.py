"""Stable Diffusion 1, 2 and XL from the command line to the files they leave, as real processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from library.files.safetensors_file import read_header
from tests.e2e.sd_runs import SCRIPTS, model_flags, write_dataset


@pytest.fixture
def dataset(picture_folder, tmp_path) -> Path:
    return write_dataset(tmp_path / "my.toml", picture_folder(5))


VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
A_MODULE = {
    "sd1": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "sd2": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "sdxl": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
}


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd1", "sd2")), "sdxl"])
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
