"""Anima from the command line to the files it leaves, as real processes on tiny checkpoints in the real key layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import toml
from PIL import Image

from library.files.safetensors_file import read_header
from tests.e2e.anima_runs import CACHED, SCRIPT, model_flags, run_flags, same_lora, write_dataset


@pytest.fixture
def dataset(picture_folder, tmp_path) -> Path:
    return write_dataset(tmp_path / "my.toml", picture_folder(5))


def guide_flags(tiny_anima, dataset, output: Path) -> list[str]:
    return [
        *model_flags(tiny_anima), f"--dataset_config={dataset}", f"--output_dir={output}", "--output_name=my_anima_lora",
        "--save_model_as=safetensors", "--network_module=networks.lora_anima", "--network_dim=8", "--learning_rate=1e-4",
        "--optimizer_type=AdamW8bit", "--lr_scheduler=constant", "--timestep_sampling=sigmoid", "--discrete_flow_shift=1.0",
        "--max_train_epochs=3", "--save_every_n_epochs=1", "--mixed_precision=bf16", "--gradient_checkpointing", "--cache_latents",
        "--cache_text_encoder_outputs", "--vae_chunk_size=64", "--vae_disable_cache", "--seed=3",
    ]  # fmt: skip


def test_the_command_of_the_guide(run_script, tiny_anima, dataset, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --w 64 --h 64 --s 2 --d 1 --n blurry\nanother --w 64 --h 80 --s 2 --l 1\n")
    sampling = [f"--sample_prompts={prompts}", "--sample_every_n_epochs=2", f"--logging_dir={tmp_path / 'logs'}", "--save_state"]
    flags = guide_flags(tiny_anima, dataset, tmp_path / "out")
    done = run_script(SCRIPT, *flags, *sampling, launcher=1)
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["my_anima_lora-000001-state", "my_anima_lora-000001.safetensors", "my_anima_lora-000002-state",
                     "my_anima_lora-000002.safetensors", "my_anima_lora-state", "my_anima_lora.safetensors", "sample"]  # fmt: skip
    header = read_header(tmp_path / "out" / "my_anima_lora.safetensors")
    assert "lora_unet_blocks_0_self_attn_q_proj.lora_down.weight" in header.tensors
    assert header.metadata["ss_base_model_version"] == "anima" and header.metadata["sshs_model_hash"]
    pictures = sorted((tmp_path / "out" / "sample").iterdir())
    assert [re.sub(r"\d{14}", "T", p.name) for p in pictures] == [
        "my_anima_lora_e000002_00_T_1.png",
        "my_anima_lora_e000002_01_T.png",
    ]
    assert [Image.open(p).size for p in pictures] == [(64, 64), (64, 80)]
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert "plan for" in done.stdout and "5 images" in done.stdout

    # the same, with every value in a file, and without the launcher
    values = {}
    for flag in guide_flags(tiny_anima, dataset, tmp_path / "out2"):
        name, _, value = flag.removeprefix("--").partition("=")
        values[name] = value if value else True
    for name in ("network_dim", "max_train_epochs", "save_every_n_epochs", "vae_chunk_size", "seed"):
        values[name] = int(values[name])
    values.update(learning_rate=1e-4, discrete_flow_shift=1.0)
    (tmp_path / "run.toml").write_text(toml.dumps({"training": values}))
    done = run_script(SCRIPT, f"--config_file={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_lora(tmp_path / "out" / "my_anima_lora.safetensors", tmp_path / "out2" / "my_anima_lora.safetensors")


def test_folders_named_with_repeats(run_script, tiny_anima, picture_folder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture_folder(3).rename(root / "2_red thing")
    done = run_script(SCRIPT, *model_flags(tiny_anima), f"--train_data_dir={root}", "--resolution=64,64", "--enable_bucket",
                      "--bucket_reso_steps=16", "--min_bucket_reso=32", "--max_bucket_reso=128", "--caption_extension=.txt",
                      f"--output_dir={tmp_path / 'out'}", "--network_module=networks.lora_anima", "--max_train_epochs=1",
                      "--train_batch_size=2", *CACHED)  # fmt: skip
    assert done.returncode == 0, done.stderr
    metadata = read_header(tmp_path / "out" / "last.safetensors").metadata
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_red thing": {"n_repeats": 2, "img_count": 3}}
    assert metadata["ss_resolution"] == "(64, 64)"


def test_shuffled_captions_are_cached_in_variants(run_script, tiny_anima, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2), shuffle_caption=True, caption_dropout_rate=0.3)
    flags = [*model_flags(tiny_anima), *run_flags(tmp_path / "out", dataset), *CACHED, "--max_train_epochs=3"]
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    assert "3 variants" in done.stdout
