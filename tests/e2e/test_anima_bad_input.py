"""What a new user gets wrong: each ends in one message with what, where and what to do; status 2, no traceback."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.anima_runs import CACHED, SCRIPT, model_flags, run_flags, write_dataset


@pytest.fixture
def attempt(run_script, tiny_anima, picture_folder, tmp_path):
    """``attempt(*flags, models=..., **subset)`` runs with a good set-up changed by ``flags``; returns its one error block."""
    images = picture_folder(3)

    def run(*flags: object, models: dict | None = None, dataset: Path | None = None, **subset: object) -> str:
        dataset = dataset or write_dataset(tmp_path / "my.toml", images, **subset)
        base = [
            *model_flags({**tiny_anima, **(models or {})}),
            *run_flags(tmp_path / "out", dataset),
            "--max_train_steps=1",
            *CACHED,
        ]
        done = run_script(SCRIPT, *base, *flags, timeout=120)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done.stderr
        return done.stderr

    run.images = images  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(("name", "flag"), [("dit", "--pretrained_model_name_or_path"), ("qwen3", "--qwen3"), ("vae", "--vae")])
def test_a_mistyped_model_path(attempt, tiny_anima, name, flag):
    right = tiny_anima[name]
    message = attempt(models={name: right.with_name(right.name.replace("tiny", "tinny"))})
    assert flag in message and "tinny" in message and f"did you mean {right.name}" in message


def test_all_model_paths_missing_are_one_report(attempt, tmp_path):
    message = attempt(models={name: tmp_path / "nowhere" / name for name in ("dit", "qwen3", "vae")})
    assert all(flag in message for flag in ("--pretrained_model_name_or_path", "--qwen3", "--vae"))


@pytest.mark.parametrize(
    ("given", "as_what", "named"),
    [("qwen3", "dit", "Qwen3"), ("vae", "dit", "VAE"), ("dit", "vae", "Anima"), ("vae", "qwen3", "VAE")],
)
def test_a_checkpoint_of_another_kind_is_named(attempt, tiny_anima, given, as_what, named):
    assert named in attempt(models={as_what: tiny_anima[given]})


def test_a_truncated_checkpoint(attempt, tiny_anima, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_anima["dit"].read_bytes()[:-1000])
    assert "truncated" in attempt(models={"dit": cut})


def test_toml_syntax_error_names_file_and_line(attempt, tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("[general]\nresolution = 64\n[[datasets]\n")
    message = attempt(dataset=broken)
    assert "broken.toml" in message and "3" in message


def test_unknown_key_and_wrong_type(attempt):
    message = attempt(num_repeatz=2, flip_aug="yes")
    assert "num_repeatz" in message and "did you mean num_repeats" in message and "flip_aug" in message and "my.toml" in message


def test_an_empty_folder(attempt, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in attempt(dataset=write_dataset(tmp_path / "e.toml", tmp_path / "empty"))


def test_bad_images_are_all_listed(attempt):
    folder = attempt.images
    (folder / "zero.png").write_bytes(b"")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (40_000, 20)).save(folder / "wide.png")
    message = attempt()
    assert all(name in message for name in ("zero.png", "broken.jpg", "dot.png", "wide.png"))
    assert "--skip_bad_images" in message


def test_a_caption_that_is_not_utf8(attempt):
    next(attempt.images.glob("*.txt")).write_bytes("café".encode("latin-1"))
    assert "UTF-8" in attempt()


def test_a_resolution_that_no_bucket_allows(attempt, tmp_path):
    dataset = write_dataset(tmp_path / "r.toml", attempt.images, resolution=16)
    assert "min_bucket_reso" in attempt(dataset=dataset)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--network_dim=0"], ["--network_dim"]),
        (["--network_args", "rank_dropuot=0.1"], ["rank_dropuot", "rank_dropout"]),
        (["--network_args", "include_patterns=['.*nothing_like_it.*']"], ["include_patterns", "nothing_like_it"]),
        (["--network_module=networks.lora_anmia"], ["networks.lora_anmia", "networks.lora_anima"]),
        (["--optimizer_type=AdamV"], ["AdamV", "AdamW"]),
        (["--lr_scheduler=cosin"], ["cosin", "cosine"]),
        (["--lerning_rate=1e-4"], ["--lerning_rate", "--learning_rate"]),
        (["--resume=nowhere-state"], ["nowhere-state"]),
        (["--network_weights=nowhere.safetensors"], ["--network_weights", "nowhere.safetensors"]),
        (["--base_weights", "nowhere.safetensors"], ["--base_weights", "nowhere.safetensors"]),
        (["--optimizer_args", "weigth_decay=1"], ["weigth_decay", "weight_decay"]),
        (["--lr_scheduler=cosine_with_restarts", "--lr_scheduler_args", "num_cycle=3"], ["num_cycle"]),
        (["--log_tracker_config=nowhere.toml", "--logging_dir=logs"], ["--log_tracker_config", "nowhere.toml"]),
        (["--sample_prompts=nope.txt", "--sample_every_n_steps=1"], ["nope.txt"]),
    ],
)  # fmt: skip
def test_flags(attempt, flags, words):
    message = attempt(*flags, "--dry_run")  # all of it shows before a model is loaded
    assert all(word in message for word in words), message


def test_a_prompt_file_with_a_bad_flag(attempt, tmp_path):
    (tmp_path / "p.txt").write_text("fine\na cat --w 64 --wdith 64\n")
    message = attempt(f"--sample_prompts={tmp_path / 'p.txt'}", "--sample_every_n_steps=1")
    assert "p.txt" in message and "wdith" in message and "2" in message


def test_a_half_state(attempt, tmp_path):
    state = tmp_path / "half-state"
    state.mkdir()
    (state / "network.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert "incomplete" in attempt(f"--resume={state}")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs to mount a small file system")
class TestSmallDisk:
    def test_for_the_lora_is_told_before_training(self, attempt, small_disk):
        message = attempt(f"--output_dir={small_disk}", "--network_dim=64")
        assert "--output_dir" in message and str(small_disk) in message and "free" in message
        assert not list(small_disk.iterdir())

    def test_while_caching(self, attempt, small_disk):
        (small_disk / "filler").write_bytes(b"x" * 60_000)
        message = attempt(f"--cache_dir={small_disk / 'cache'}")
        assert "free" in message


@pytest.mark.skipif(os.name == "nt", reason="POSIX paths")
def test_an_output_folder_that_cannot_be_written(attempt, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    message = attempt(f"--output_dir={tmp_path / 'file' / 'out'}")
    assert "--output_dir" in message


def test_help_and_a_typo_answer_at_once_without_torch(run_script):
    done = run_script(SCRIPT, "--help", environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and "--network_dim" in done.stdout and " torch\n" not in done.stderr
    done = run_script(SCRIPT, "--netwrok_dim=4", environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 2 and "--network_dim" in done.stderr and " torch\n" not in done.stderr


def test_several_wrong_flags_are_one_report(attempt):
    message = attempt("--network_dim=0", "--max_train_steps=-1", "--caption_dropout_rate=3")
    assert all(word in message for word in ("--network_dim", "--max_train_steps", "--caption_dropout_rate")), message
