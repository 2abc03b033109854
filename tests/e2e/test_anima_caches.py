"""Caches that kohya-ss/sd-scripts wrote for Anima, taken over by a training run as a real process."""

from __future__ import annotations

import pytest
from PIL import Image

from library.anima.architecture import ANIMA
from library.anima.text import AnimaConditioning
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.preflight import check_run
from tests.e2e.anima_runs import CACHED, SCRIPT, model_flags, run_flags, same_lora, write_dataset
from tests.library.anima.reference_files import write_latents, write_text


@pytest.fixture
def pictures(picture_folder):
    return picture_folder(4)


def write_reference_caches(flags: list[str]) -> None:
    """What this project's caches of the run hold, as the other program would have written it, older versions of it too."""
    run = check_run(read_options(AnimaTrainOptions, flags), ANIMA)
    assert run.latent_cache is not None and run.text_cache is not None
    run.text_cache.conditioning_type = AnimaConditioning
    for item in run.training_set.items:
        latents, flipped = (run.latent_cache.load(item, flipped=flip).numpy() for flip in (False, True))
        if item.index % 2:
            latents, flipped = latents[:, None], flipped[:, None]
        write_latents(item.path, Image.open(item.path).size, latents, flipped=flipped)
        text = run.text_cache.load(item).cache_tensors()
        write_text(item.path, text["prompt_embeds"].numpy(), text["t5_ids"].numpy())


def test_training_on_caches_of_the_reference(run_script, tiny_anima, pictures, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", pictures, flip_aug=True)

    def flags(output):
        return [*model_flags(tiny_anima), *run_flags(tmp_path / output, dataset), *CACHED, "--max_train_steps=4"]

    done = run_script(SCRIPT, *flags("own"))
    assert done.returncode == 0, done.stdout + done.stderr
    write_reference_caches(flags("own"))
    for path in pictures.glob("*.safetensors"):
        path.unlink()
    edited = next(pictures.glob("*.txt"))
    edited.write_text(f"more, {edited.read_text()}")
    edited_now = run_script(SCRIPT, *flags("edited"))  # in which the .npz play no part
    assert edited_now.returncode == 0, edited_now.stdout + edited_now.stderr
    for path in pictures.glob("*.safetensors"):
        path.unlink()
    done = run_script(SCRIPT, *flags("taken"), "--import_reference_caches")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "latent cache: 4 taken over\n" in done.stdout and "latent cache: 4 made" not in done.stdout
    assert "text cache: 3 taken over, 1 not: 1 made from another text than is trained" in done.stdout, done.stdout
    assert same_lora(tmp_path / "edited" / "tiny.safetensors", tmp_path / "taken" / "tiny.safetensors")
    assert not same_lora(tmp_path / "own" / "tiny.safetensors", tmp_path / "taken" / "tiny.safetensors")


def test_two_processes_share_what_they_take_over(run_script, tiny_anima, pictures, tmp_path):
    """In memory, where each needs all of it; the tool's own files come first, to be turned into the other program's."""
    dataset = write_dataset(tmp_path / "my.toml", pictures, flip_aug=True)
    flags = [*model_flags(tiny_anima), *run_flags(tmp_path / "out", dataset), "--max_train_steps=3"]
    for tool in ("tools/cache_latents.py", "tools/cache_text_encoder_outputs.py"):
        done = run_script(tool, "--anima", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
    write_reference_caches([*flags, *CACHED])
    for path in pictures.glob("*.safetensors"):
        path.unlink()
    in_memory = ("--cache_latents", "--cache_text_encoder_outputs", "--import_reference_caches")
    done = run_script(SCRIPT, *flags, *in_memory, launcher=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("latent cache: 4 taken over\n") == done.stdout.count("text cache: 4 taken over\n") == 1
    assert "latent cache: 4 made" not in done.stdout and "training is done: 3 steps" in done.stdout
    assert not list(pictures.glob("*.safetensors"))
