"""Filling the caches of a run: what another program has cached is taken over, and only the rest needs a model."""

from __future__ import annotations

import os
from datetime import timedelta

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.preflight import check_run
from tests.tiny_arch import TinyArchitecture, TinyConditioning, TinyTrainer

MEMORY = ("--cache_latents", "--cache_text_encoder_outputs")
DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


class Noting(TinyTrainer):
    """Notes what is loaded."""

    def __init__(self, run):
        super().__init__(run)
        self.loaded: list[str] = []

    def load_vae(self, **settings):
        self.loaded.append("vae")
        return super().load_vae(**settings)

    def load_text_encoder(self, text_encoder, **settings):
        self.loaded.append("text")
        super().load_text_encoder(text_encoder, **settings)


@pytest.fixture
def filled(picture_folder, tmp_path):
    """``filled(*flags)``: a trainer (a Noting one) of five pictures whose caches are filled."""
    folder = picture_folder(5)
    (tmp_path / "set.toml").write_text(
        f"[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 16\n"
        f'flip_aug = true\ncaption_extension = ".txt"\n[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\n'
        f'image_dir = "{folder.as_posix()}"\n'
    )

    def run(*flags: object, trainer_class: type[TinyTrainer] = Noting) -> TinyTrainer:
        base = ["--pretrained_model_name_or_path=x", "--qwen3=x", "--vae=x", f"--dataset_config={tmp_path / 'set.toml'}"]
        base += [f"--output_dir={tmp_path / 'out'}", "--network_module=networks.lora_anima", "--seed=1", "--max_train_steps=2"]
        trainer = trainer_class(check_run(read_options(AnimaTrainOptions, [*base, *map(str, flags)]), TinyArchitecture()))
        trainer.start_accelerator()
        trainer.fill_caches()
        return trainer

    return run


def as_reference_files(trainer: TinyTrainer) -> None:
    """What is in the caches, as another program would have written it."""
    run = trainer.run
    run.text_cache.conditioning_type = TinyConditioning
    for item in run.training_set.items:
        arrays = {
            name: run.latent_cache.load(item, flipped=name == "latents_flipped").numpy()
            for name in ("latents", "latents_flipped")
        }
        name = f"{item.path.stem}_{item.size_wh[0]:04d}x{item.size_wh[1]:04d}_tiny.npz"
        np.savez(item.path.with_name(name), **arrays, original_size=np.array(item.size_wh), crop_ltrb=np.zeros(4))
        np.savez(item.path.with_name(f"{item.path.stem}_tiny_te.npz"), lengths=run.text_cache.load(item).lengths[0].numpy())


@pytest.fixture
def other_program(filled, tmp_path):
    """The folder of pictures with another program's caches beside them, and the trainer whose values they hold."""
    trainer = filled(*MEMORY)
    as_reference_files(trainer)
    return trainer


def same_caches(first: TinyTrainer, second: TinyTrainer) -> bool:
    for trainer in (first, second):
        trainer.run.text_cache.conditioning_type = TinyConditioning
    items = first.run.training_set.items
    latents = all(
        first.run.latent_cache.load(item, flipped=flipped).equal(second.run.latent_cache.load(item, flipped=flipped))
        for item in items
        for flipped in (False, True)
    )
    return latents and all(
        first.run.text_cache.load(item).lengths.equal(second.run.text_cache.load(item).lengths) for item in items
    )


@pytest.mark.parametrize("flags", [MEMORY, DISK])
def test_what_another_program_cached_is_taken_over_and_nothing_is_loaded(filled, other_program, flags, caplog):
    caplog.set_level("INFO")
    trainer = filled(*flags, "--import_reference_caches")
    assert trainer.loaded == ["text"]  # for the empty caption, which no file has
    assert same_caches(trainer, other_program)
    assert "that they were made with this VAE and these settings cannot be checked" in caplog.text
    assert "5 taken over" in caplog.text
    if flags == DISK:
        assert filled(*flags).loaded == []  # they are ordinary entries now


def test_nothing_is_taken_over_unasked(filled, other_program):
    assert filled(*DISK).loaded == ["vae", "text"]


def test_what_does_not_fit_is_encoded_and_told(filled, other_program, tmp_path, caplog):
    pictures = tmp_path / "pictures"
    newer, gone, edited, broken = sorted(
        path for path in pictures.iterdir() if path.suffix in (".png", ".jpg", ".jpeg", ".webp")
    )[:4]
    os.utime(newer, (newer.stat().st_atime + 100, newer.stat().st_mtime + 100))
    for path in pictures.glob(f"{gone.stem}_*_tiny.npz"):
        path.unlink()
    (pictures / f"{broken.stem}_tiny_te.npz").write_bytes(b"PK\3\4")
    caplog.set_level("INFO")
    trainer = filled(*MEMORY, "--import_reference_caches")
    assert trainer.loaded == ["vae", "text"] and same_caches(trainer, other_program)
    assert "latent cache: 3 taken over, 1 not: 1 older than the image" in caplog.text
    assert "text cache: 4 taken over, 1 not: 1 that cannot be read" in caplog.text and str(broken) in caplog.text


def test_a_folder_without_such_files_is_no_reason_to_complain(filled, caplog):
    caplog.set_level("INFO")
    assert filled(*MEMORY, "--import_reference_caches").loaded == ["vae", "text"]
    assert "latent cache: 0 taken over\n" in caplog.text and "text cache: 0 taken over\n" in caplog.text


def test_a_complete_cache_asks_for_nothing(filled, other_program, caplog):
    filled(*DISK)
    caplog.set_level("INFO")
    assert filled(*DISK, "--import_reference_caches").loaded == []
    assert "taken over" not in caplog.text


@pytest.mark.parametrize(("flags", "given_back"), [((), 2), (("--highvram",), 0)])
def test_highvram_keeps_gpu_memory_between_encoding(filled, monkeypatch, flags, given_back):
    trainer = filled(*MEMORY, *flags)
    times: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: times.append("given back"))
    trainer.device = torch.device("cuda")  # by name only: nothing is put there
    trainer.after_caching()
    trainer.after_caching()
    assert len(times) == given_back


class Counting(TinyTrainer):
    """Notes how many images and captions are encoded at a time."""

    def __init__(self, run):
        super().__init__(run)
        self.images: list[int] = []
        self.captions: list[int] = []

    def encode_images(self, vae, pixels, seeds):
        self.images.append(len(pixels))
        return super().encode_images(vae, pixels, seeds)

    def encode_text(self, text_encoder, captions):
        self.captions.append(len(captions))
        return super().encode_text(text_encoder, captions)


@pytest.mark.parametrize(
    ("flags", "images", "captions"),
    [
        ((), 1, 1),
        (("--vae_batch_size=2",), 2, 1),
        (("--text_encoder_batch_size=4",), 1, 4),
    ],
)
def test_how_much_is_encoded_at_a_time(filled, flags, images, captions):
    trainer = filled(*MEMORY, *flags, trainer_class=Counting)
    assert max(trainer.images) == images and max(trainer.captions) == captions
    assert sum(trainer.images) == 10 and sum(trainer.captions) == 6  # five pictures, also mirrored; and the empty caption


class Reached(Exception):
    """The processes would be joined now."""


@pytest.mark.parametrize(("flags", "minutes"), [(("--ddp_timeout=7",), 7), (("--ddp_timeout=0",), None), ((), None)])
def test_ddp_timeout_is_how_long_processes_wait(filled, monkeypatch, flags, minutes):
    joined: dict[str, object] = {}

    def join(*args, **settings):
        joined.update(settings)
        raise Reached

    trainer = filled(*MEMORY, *flags)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate would set it, for good
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(Reached):
        trainer.start_accelerator()
    assert joined.get("timeout") == (minutes and timedelta(minutes=minutes))
