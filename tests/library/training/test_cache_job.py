"""Caching without training, with the fake architecture in this process."""

from __future__ import annotations

import pytest

from library.errors import CheckpointError, DatasetError
from library.options.anima import AnimaTrainOptions
from library.options.cache_tool import read_cache_tool_options
from library.options.train import TrainOptions
from library.training.cache_job import check_job, checked_job, fill, job_lines
from tests.tiny_arch import TinyArchitecture, TinyTrainer


@pytest.fixture
def read(picture_folder, tmp_path):
    """``read("vae", "--max_train_epochs=2", shuffle_caption=True)``: options of a tool for five pictures."""
    folder = picture_folder(5)

    def options(part: str, *flags: object, **subset: object):
        keys = "\n".join(f"{key} = {str(value).lower()}" for key, value in subset.items())
        (tmp_path / "set.toml").write_text(
            f"[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 16\n"
            f'caption_extension = ".txt"\n[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n{keys}\n'
        )
        base = ["--anima", f"--dataset_config={tmp_path / 'set.toml'}", "--vae=v", "--qwen3=q"]
        return read_cache_tool_options(AnimaTrainOptions, part, [*base, *map(str, flags)])

    return options


def run(options, part: str):
    data = checked_job(lambda: options, TinyArchitecture(), part)
    fill(TinyTrainer, data, part)
    return data


@pytest.mark.parametrize("part, files", [("vae", "*-latents.safetensors"), ("text", "*-text.safetensors")])
def test_a_cache_is_filled(read, tmp_path, part, files, capsys):
    data = run(read(part), part)
    assert len(list((tmp_path / "pictures").glob(files))) == 5
    assert len(list((tmp_path / "pictures").glob("*.safetensors"))) == 5 + (part == "text")  # and the prompts' file
    assert (data.latent_cache or data.text_cache).state().is_complete
    shown = capsys.readouterr().out
    assert "of 5 images for Anima (beside the images)" in shown and "5 missing" in shown or "6 missing" in shown
    assert "on disk, " in shown and "of them made now; train with --cache_" in shown


def test_what_is_complete_needs_no_torch(read, capsys):
    run(read("vae"), "vae")
    with pytest.raises(SystemExit) as ended:
        checked_job(lambda: read("vae"), TinyArchitecture(), "vae")
    assert not ended.value.code
    assert "all 5 latents are on disk, nothing was missing" in capsys.readouterr().out


def test_dry_run_only_tells(read, tmp_path, capsys):
    with pytest.raises(SystemExit):
        checked_job(lambda: read("text", "--dry_run"), TinyArchitecture(), "text")
    assert "0 of 6 cached on disk, 6 missing, 0 to be made again" in capsys.readouterr().out
    assert not list((tmp_path / "pictures").glob("*.safetensors"))


def test_stale_entries_are_told_with_their_reasons(read, tmp_path):
    run(read("vae"), "vae")
    picture = next((tmp_path / "pictures").glob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"more")
    data = check_job(read("vae"), TinyArchitecture(), "vae")
    lines = list(job_lines(data, "vae"))
    assert "4 of 5 cached on disk, 0 missing, 1 to be made again" in lines[1] and "image changed: 1" in lines[2]


def test_existing_files_are_left_as_they_are(read, tmp_path):
    run(read("vae"), "vae")
    file = next((tmp_path / "pictures").glob("*-latents.safetensors"))
    file.write_bytes(b"broken")
    assert check_job(read("vae", "--skip_existing"), TinyArchitecture(), "vae").latent_cache.state().is_complete
    assert not check_job(read("vae"), TinyArchitecture(), "vae").latent_cache.state().is_complete


def test_variants_are_counted_as_training_counts_them(read):
    data = check_job(read("text", "--max_train_epochs=4", shuffle_caption=True), TinyArchitecture(), "text")
    assert data.text_cache.variants == 4 and "4 variants" in list(job_lines(data, "text"))[-1]
    data = check_job(read("text", "--max_train_steps=6", shuffle_caption=True), TinyArchitecture(), "text")
    assert data.text_cache.variants == 2  # 3 batches in an epoch
    data = check_job(read("text", "--caption_variants=5", shuffle_caption=True), TinyArchitecture(), "text")
    assert data.text_cache.variants == 5


def test_sample_prompts_are_texts_too(read, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --n blurry\n")
    assert check_job(read("text", f"--sample_prompts={prompts}"), TinyArchitecture(), "text").text_cache.state().total == 5 + 3
    check_job(read("vae", f"--sample_prompts={tmp_path / 'gone.txt'}"), TinyArchitecture(), "vae")  # no text: not looked at


def test_the_problems_of_data_and_model_come_together(read, tmp_path):
    class Broken(TinyArchitecture):
        def read_layouts(self, options, parts=()):
            raise CheckpointError(f"no {', '.join(parts)}")

    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(CheckpointError) as caught:
        check_job(read("vae"), Broken(), "vae")
    assert "no vae" in caught.value.problems[-1] and "broken.png" in caught.value.problems[0]


def test_nothing_is_fetched_while_the_data_is_wrong(read, tmp_path, monkeypatch):
    def fetch(self, options, parts=()):
        raise AssertionError("fetched")

    monkeypatch.setattr(TinyArchitecture, "read_layouts", fetch)
    monkeypatch.setattr(TrainOptions, "fetches_models", True)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="broken.png"):
        check_job(read("vae"), TinyArchitecture(), "vae")


def test_captions_that_are_cut_are_told_where_they_are_encoded(read, tmp_path):
    for caption in (tmp_path / "pictures").glob("*.txt"):
        caption.write_text("x" * 50)
    assert not any("longer" in warning for warning in check_job(read("vae"), TinyArchitecture(), "vae").warnings)
    assert any("captions are longer" in warning for warning in check_job(read("text"), TinyArchitecture(), "text").warnings)


def test_what_a_model_file_shows_is_told(read, capsys):
    class Doubtful(TinyArchitecture):
        def warnings_of(self, layouts, options):
            return ("the VAE is odd",)

    with pytest.raises(SystemExit):
        checked_job(lambda: read("vae", "--dry_run"), Doubtful(), "vae")
    assert "warning: the VAE is odd" in "".join(capsys.readouterr())
