"""Caches that kohya-ss/sd-scripts wrote for flow models, taken over by training runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.items import Item
from library.training.preflight import CheckedRun
from tests.e2e.kinds import CACHED, KINDS, model_flags, over, run_flags, write_dataset
from tests.library.anima import reference_files as anima
from tests.library.sd3 import reference_files as sd3
from tests.tiny_runs import same_tensors
from tests.trainer_runs import Runs

# the text encoders' results from the files alone; SGD, as AdamW makes much of the smallest gradients
STEPS = (*CACHED, "--network_train_unet_only", "--max_train_steps=4", "--optimizer_type=SGD", "--learning_rate=1")
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609


@pytest.fixture
def pictures(picture_folder) -> Path:
    return picture_folder(4)


def write_reference_caches(kind: str, run: CheckedRun, texts: type) -> None:
    """What this project's caches of the run hold, as the other program would have written it. ``texts``: the class of the
    conditioning."""
    assert run.latent_cache is not None and run.text_cache is not None
    run.text_cache.conditioning_type = texts
    for item in run.training_set.items:
        plain, flipped = (run.latent_cache.load(item, flipped=flip).numpy() for flip in (False, True))
        write_latents(kind, item, plain, flipped)
        text = {name: tensor.numpy() for name, tensor in run.text_cache.load(item).cache_tensors().items()}
        write_text(kind, item, text, run)


def write_latents(kind: str, item: Item, plain: np.ndarray, flipped: np.ndarray) -> None:
    """As they are and mirrored; of Anima also as older versions wrote them. SD3's are kept as its VAE gives them."""
    if kind == "sd3":
        plain, flipped = (side / np.float32(SD3_SCALE) + np.float32(SD3_SHIFT) for side in (plain, flipped))
    elif kind == "anima" and item.index % 2:
        plain, flipped = plain[:, None], flipped[:, None]
    anima.write_latents(item.path, Image.open(item.path).size, plain, flipped=flipped, model=kind)


def write_text(kind: str, item: Item, text: Mapping[str, np.ndarray], run: CheckedRun) -> None:
    caption = item.path.with_suffix(".txt").read_text().strip()
    if kind == "anima":
        anima.write_text(item.path, text["prompt_embeds"], text["t5_ids"])
    elif kind == "sd3":
        states = {
            "lg_out": np.concatenate([text["l_states"], text["g_states"]], axis=1),
            "lg_pooled": np.concatenate([text["l_pooled"], text["g_pooled"]]),
            "t5_out": text["t5_states"],
        }
        sd3.save_text(item.path, caption, states)
    else:
        write_gemma_text(item.path, run.layouts.tokenizer.load().ids(caption), text["states"])


def write_gemma_text(image: Path, ids: list[int], states: np.ndarray, rows: int = 256) -> None:
    """Rows of padding hold numbers, too."""
    padding = rows - len(ids)
    np.savez(
        image.with_name(f"{image.stem}_lumina_te.npz"),
        hidden_state=np.concatenate([states, np.ones((padding, states.shape[1]), np.float32)]),
        attention_mask=(np.arange(rows) < len(ids)).astype(np.int64),
        input_ids=np.array(ids + [0] * padding),
    )


def forget_own_caches(pictures: Path) -> None:
    for path in pictures.glob("*.safetensors"):
        path.unlink()


def close(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        (first[key] - second[key]).abs().max() <= 1e-6 + 1e-3 * first[key].abs().max() for key in first
    )


@over("anima", "sd3", "lumina")
def test_training_on_caches_of_the_reference(kind, request, pictures, tmp_path, caplog):
    runs = Runs(kind, tmp_path, request.getfixturevalue(KINDS[kind].fixture), pictures)
    runs.write_dataset(flip_aug=True)
    trainer: Any = runs.train(*STEPS, output="own")
    write_reference_caches(kind, runs.checked(*STEPS, output="own"), trainer.conditioning_type())
    forget_own_caches(pictures)
    edited = next(pictures.glob("*.txt"))
    edited.write_text(f"more, {edited.read_text()}")
    runs.train(*STEPS, output="edited")  # in which the .npz play no part
    forget_own_caches(pictures)
    caplog.clear()
    caplog.set_level("INFO")
    runs.train(*STEPS, "--import_reference_caches", output="taken")
    assert "latent cache: 4 taken over\n" in f"{caplog.text}\n" and "latent cache: 4 made" not in caplog.text
    assert "text cache: 3 taken over, 1 not: 1 made from another text " in caplog.text, caplog.text
    assert close(runs.lora("edited"), runs.lora("taken")) and not close(runs.lora("own"), runs.lora("taken"))
    if kind != "sd3":  # whose latents are scaled again
        assert same_tensors(runs.lora("edited"), runs.lora("taken"))


@over(slow=("anima", "sd3", "lumina"))
def test_two_processes_share_what_they_take_over(run_script, kind, request, pictures, tmp_path):
    """In memory, where each needs all of it; the tool's own files come first, to be turned into the other program's."""
    models = request.getfixturevalue(KINDS[kind].fixture)
    runs = Runs(kind, tmp_path, models, pictures)
    dataset = write_dataset(tmp_path / "my.toml", pictures, kind, flip_aug=True)
    flags = [*model_flags(kind, models), *run_flags(kind, tmp_path / "out", dataset), "--max_train_steps=3"]
    for tool in ("tools/cache_latents.py", "tools/cache_text_encoder_outputs.py"):
        done = run_script(tool, f"--{kind}", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
    checked = runs.checked(*CACHED, "--max_train_steps=3", "--network_train_unet_only")
    write_reference_caches(kind, checked, runs.trainer_class(checked).conditioning_type())
    forget_own_caches(pictures)
    in_memory = ("--cache_latents", "--cache_text_encoder_outputs", "--import_reference_caches", "--network_train_unet_only")
    done = run_script(KINDS[kind].script, *flags, *in_memory, launcher=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("latent cache: 4 taken over\n") == done.stdout.count("text cache: 4 taken over\n") == 1
    assert "latent cache: 4 made" not in done.stdout and "training is done: 3 steps" in done.stdout
    assert not list(pictures.glob("*.safetensors"))
