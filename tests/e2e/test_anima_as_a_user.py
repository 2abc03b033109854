"""What people do besides the guide's command: values in files, odd names, edited pictures, Ctrl-C at a bad moment."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from tests.e2e.anima_runs import CACHED, SCRIPT, model_flags, run_flags, same_lora, toml_value, write_dataset


def write_config(path: Path, **tables: dict[str, object]) -> None:
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in keys.items()) for name, keys in tables.items()
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def test_values_in_a_file_with_relative_paths_blanks_and_umlauts(run_script, tiny_anima, picture_folder, tmp_path):
    write_dataset(tmp_path / "bilder.toml", picture_folder(3, name="meine Bilder größer").relative_to(tmp_path))
    write_config(
        tmp_path / "einstellungen für alles.toml",
        model={
            "pretrained_model_name_or_path": str(tiny_anima["dit"]),
            "qwen3": str(tiny_anima["qwen3_folder"]),
            "vae": str(tiny_anima["vae"]),
        },
        training={
            "network_module": "networks.lora_anima",
            "network_args": ["rank_dropout=0.1", "exclude_patterns=['.*mlp.*']"],
            "max_train_epochs": 1,
            "gradient_checkpointing": True,
            "cache_latents": True,
        },
        output={"dataset_config": "bilder.toml", "output_dir": "aus gabe", "output_name": "größe"},
    )
    done = run_script(SCRIPT, "--config_file", "einstellungen für alles", "--seed", 3, "--gradient_checkpointing=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "aus gabe" / "größe.safetensors").is_file()
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_only_what_has_changed_is_encoded_again(run_script, tiny_anima, picture_folder, tmp_path):
    from tools.make_tiny_models import make_anima

    pictures = picture_folder(5)
    flags = [*model_flags(tiny_anima), *CACHED, *run_flags(tmp_path / "out", write_dataset(tmp_path / "my.toml", pictures))]
    first = run_script(SCRIPT, *flags, "--max_train_steps=1")
    assert first.returncode == 0, first.stdout + first.stderr
    edited, replaced, touched = sorted(path for path in pictures.iterdir() if path.suffix in (".png", ".jpg", ".jpeg"))[:3]
    edited.with_suffix(".txt").write_text("another caption", encoding="utf-8")
    with Image.open(replaced) as picture:
        ImageOps.invert(picture.convert("RGB")).save(replaced)
    touched.touch()

    plan = run_script(SCRIPT, *flags, "--dry_run").stdout
    assert re.search(r"latents: 4 of 5 cached on disk, 0 missing, 1 to be made again\s+\S+\s+image changed: 1\b", plan), plan
    assert re.search(
        r"text outputs: \d+ of \d+ cached on disk, 0 missing, 1 to be made again \(.*the empty one\)\s+\S+\s+caption changed: 1\b",
        plan,
    ), plan
    other = make_anima(tmp_path / "other", seed=99)
    plan = run_script(SCRIPT, *flags, f"--vae={other['vae']}", "--dry_run").stdout
    assert "model changed: 5" in plan


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_before_training_ends_at_once_and_says_so(start_script, run_script, tiny_anima, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(8, scale=0.5))
    flags = [*model_flags(tiny_anima), *CACHED, *run_flags(tmp_path / "out", dataset)]
    process = start_script(SCRIPT, *flags)
    seen = ""
    while "caching latents" not in seen:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; the same command goes on" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "out").iterdir()) == []
    plan = run_script(SCRIPT, *flags, "--dry_run").stdout
    assert re.search(r"latents: \d of 8 cached on disk, \d missing, 0 to be made again", plan), plan


@pytest.mark.slow
def test_threads_samples_and_logs_leave_the_weights_alone(run_script, tiny_anima, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(5), caption_dropout_rate=0.3, flip_aug=True)
    fixed = [*model_flags(tiny_anima), "--cache_text_encoder_outputs", "--network_dropout=0.2", "--max_train_steps=6"]
    plain = run_script(SCRIPT, *fixed, *run_flags(tmp_path / "plain", dataset), "--max_data_loader_n_workers=0")
    assert plain.returncode == 0, plain.stderr
    prompts = tmp_path / "prompts.toml"
    prompts.write_text(
        "[prompt]\nwidth = 64\nheight = 64\nsample_steps = 2\n"
        "[[prompt.subset]]\nprompt = 'ein Haus'\nseed = 7\n[[prompt.subset]]\nprompt = 'b'\nwidth = 96\n",
        encoding="utf-8",
    )
    busy = run_script(
        SCRIPT,
        *fixed,
        *run_flags(tmp_path / "busy", dataset),
        "--max_data_loader_n_workers=3",
        "--sample_prompts=prompts.toml",
        "--sample_every_n_steps=4",
        "--sample_at_first",
        "--logging_dir=logs",
        "--save_every_n_steps=2",
        "--save_state",
    )
    assert busy.returncode == 0, busy.stderr
    assert same_lora(tmp_path / "plain" / "tiny.safetensors", tmp_path / "busy" / "tiny.safetensors")
    names = sorted(re.sub(r"\d{14}", "TIME", path.name) for path in (tmp_path / "busy" / "sample").iterdir())
    assert names == [
        "tiny_000004_00_TIME_7.png",
        "tiny_000004_01_TIME.png",
        "tiny_e000000_00_TIME_7.png",
        "tiny_e000000_01_TIME.png",
    ]
    sizes = [Image.open(path).size for path in sorted((tmp_path / "busy" / "sample").iterdir())]
    assert sizes == [(64, 64), (96, 64)] * 2
