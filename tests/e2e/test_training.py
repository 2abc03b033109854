"""Every script from the command line to the files it leaves, as real processes on tiny checkpoints in the real key layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from library.files.safetensors_file import read_header
from tests.e2e.kinds import CACHED, KINDS, lora, model_flags, over, run_flags, same_lora, write_dataset


@pytest.fixture
def models(kind, request) -> list[str]:
    """The flags that name the model's files."""
    return model_flags(kind, request.getfixturevalue(KINDS[kind].fixture))


@pytest.fixture
def dataset(kind, picture_folder, tmp_path) -> Path:
    return write_dataset(tmp_path / "my.toml", picture_folder(5), kind)


@over("sd3", "lumina", slow=("sd35m", "sd35l"))
def test_the_usual_command(run_script, kind, models, dataset, tmp_path):
    """With what people of the reference have in their commands: half precision, text encoders, samples, states, curves."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --w 64 --h 64 --s 2 --d 1 --n blurry\nanother --w 64 --h 87 --s 2 --l 1\n")
    done = run_script(
        KINDS[kind].script, *models, f"--dataset_config={dataset}", f"--output_dir={tmp_path / 'out'}", "--output_name=mine",
        "--save_model_as=safetensors", f"--network_module={KINDS[kind].network}", "--network_dim=8", "--network_alpha=4",
        "--learning_rate=1e-4", "--text_encoder_lr=5e-5", "--unet_lr=1e-4", "--optimizer_type=AdamW8bit", "--lr_scheduler=cosine",
        "--max_train_epochs=2", "--save_every_n_epochs=1", "--mixed_precision=bf16", "--save_precision=fp16",
        "--gradient_checkpointing", "--cache_latents_to_disk", "--sdpa", "--noise_offset=0.0357", "--seed=3",
        f"--sample_prompts={prompts}", "--sample_every_n_epochs=1", f"--logging_dir={tmp_path / 'logs'}", "--save_state",
        "--blocks_to_swap=0", launcher=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["mine-000001-state", "mine-000001.safetensors", "mine-state", "mine.safetensors", "sample"]
    header = read_header(tmp_path / "out" / "mine.safetensors")
    assert {tensor.dtype for tensor in header.tensors.values()} == {"F16"}
    assert {name.split("_")[1] for name in header.tensors} == {"unet", *(p.split("_")[1] for p in KINDS[kind].text_prefixes)}
    assert header.metadata["ss_base_model_version"] == KINDS[kind].version and header.metadata["sshs_model_hash"]
    pictures = sorted((tmp_path / "out" / "sample").iterdir())
    assert [re.sub(r"\d{14}", "T", path.name) for path in pictures] == [
        f"mine_e{epoch:06d}_{end}" for epoch in (1, 2) for end in ("00_T_1.png", "01_T.png")
    ]
    assert [Image.open(path).size for path in pictures] == [(64, 64), (64, 80)] * 2
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert "Traceback" not in done.stderr and "64x87 to 64x80" in done.stdout + done.stderr


@over("anima", slow=("sdxl", "sd3", "lumina"))
def test_a_dry_run_prints_the_plan_and_loads_no_model(run_script, kind, models, dataset, tmp_path):
    done = run_script(
        KINDS[kind].script, *models, *run_flags(kind, tmp_path / "out", dataset), *CACHED, "--max_train_steps=9", "--dry_run"
    )
    assert done.returncode == 0, done.stderr
    for text in ("5 images", "bucket", "9 steps in all", "0 of 5 cached", "LoRA:", "MiB"):
        assert text in done.stdout, text
    assert list((tmp_path / "out").iterdir()) == []


@over("anima", slow=("sd3", "lumina"))
@pytest.mark.parametrize(
    "live", [["--mixed_precision=no"], ["--mixed_precision=bf16", "--full_bf16", "--gradient_accumulation_steps=2"]]
)
def test_without_caches_and_in_other_precisions(run_script, kind, models, dataset, tmp_path, live):
    done = run_script(KINDS[kind].script, *models, *run_flags(kind, tmp_path / "out", dataset), "--max_train_steps=2", *live)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = "torch.bfloat16" if "--full_bf16" in live else "torch.float32"
    assert {str(weight.dtype) for weight in lora(tmp_path / "out" / "tiny.safetensors").values()} == {expected}


@over("sd3", slow=("anima", "sdxl", "lumina"))
def test_warm_caches_need_no_encoder_and_change_nothing(run_script, kind, models, dataset, tmp_path):
    flags = [*models, *CACHED, "--network_train_unet_only", "--max_train_steps=3"]
    cold = run_script(KINDS[kind].script, *flags, *run_flags(kind, tmp_path / "cold", dataset))
    assert cold.returncode == 0, cold.stderr
    profile = {"PYTHONPROFILEIMPORTTIME": "1"}
    warm = run_script(KINDS[kind].script, *flags, *run_flags(kind, tmp_path / "warm", dataset), environment=profile)
    assert warm.returncode == 0, warm.stderr
    assert "5 of 5 cached" in warm.stdout
    for library in ("clip.modeling_clip", "t5.modeling_t5", "gemma2.modeling_gemma2", "qwen3.modeling_qwen3"):
        assert f"transformers.models.{library}" not in warm.stderr
    if kind != "sdxl":  # whose U-Net is diffusers'
        assert "| diffusers" not in warm.stderr and "| transformers" not in warm.stderr
    assert same_lora(tmp_path / "cold" / "tiny.safetensors", tmp_path / "warm" / "tiny.safetensors")


@over("anima", slow=("sd1", "sd3", "lumina"))
def test_two_processes_train_as_one_with_twice_the_batch(run_script, kind, models, picture_folder, tmp_path):
    images = picture_folder(6)
    one = write_dataset(tmp_path / "one.toml", images, kind, batch_size=2)
    two = write_dataset(tmp_path / "two.toml", images, kind, batch_size=1)
    flags = [*models, "--cache_latents_to_disk", "--max_train_steps=4", "--noise_offset=0.1"]
    single = run_script(KINDS[kind].script, *flags, *run_flags(kind, tmp_path / "single", one))
    assert single.returncode == 0, single.stderr
    pair = run_script(KINDS[kind].script, *flags, *run_flags(kind, tmp_path / "pair", two), launcher=2)
    assert pair.returncode == 0, pair.stdout + pair.stderr
    a, b = lora(tmp_path / "single" / "tiny.safetensors"), lora(tmp_path / "pair" / "tiny.safetensors")
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 2e-6 + 1e-3 * a[name].abs().max(), name
