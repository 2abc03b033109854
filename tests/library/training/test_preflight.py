"""What a user is told before a model is loaded."""

from __future__ import annotations

import pytest

from library.errors import CheckpointError, OutputError, UserError
from library.options.train import TrainOptions
from tests.tiny_arch import TinyArchitecture
from tests.tiny_runs import TinyRuns


def test_caches_that_cannot_be_written_name_the_flag_that_moves_them(picture_folder, tmp_path):
    runs = TinyRuns(tmp_path, picture_folder(2))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="the caches cannot be written to .*; give --cache_dir a folder that can be written"):
        runs.checked("--max_train_steps=1", "--cache_latents_to_disk", f"--cache_dir={tmp_path / 'file' / 'caches'}")


def test_links_that_lead_nowhere_are_called_that(picture_folder, tmp_path):
    runs = TinyRuns(tmp_path, picture_folder(2))
    (tmp_path / "dead").symlink_to("gone")
    nowhere = rf"{tmp_path / 'dead'} is a link that leads nowhere \(to gone\)"
    tried = "the folder cannot be made or written to"
    with pytest.raises(OutputError, match=f"--output_dir .*: {tried}: {nowhere}; name a folder on a disk"):
        runs.checked("--max_train_steps=1", output="dead")
    with pytest.raises(CheckpointError, match=f"--network_weights .*: there is no such file: {nowhere}"):
        runs.checked("--max_train_steps=1", f"--network_weights={tmp_path / 'dead'}")


@pytest.mark.parametrize("fetches", [True, False])
def test_mistakes_are_told_before_a_model_is_fetched(fetches, tmp_path, monkeypatch):
    def fetch(self, options, parts=()):
        raise CheckpointError("the model is wrong, too")

    monkeypatch.setattr(TrainOptions, "fetches_models", fetches)
    monkeypatch.setattr(TinyArchitecture, "read_layouts", fetch)
    with pytest.raises(UserError) as caught:
        TinyRuns(tmp_path, tmp_path / "no pictures").checked("--max_train_steps=1")
    assert "no pictures" in caught.value.problems[0]
    assert caught.value.problems[1:] == (() if fetches else ("the model is wrong, too",))


def test_captions_and_sample_prompts_that_lose_their_end_are_told(picture_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"a cat --n {'x' * 30}\na dog --n {'y' * 41}\n{'z' * 50}\n")
    run = TinyRuns(tmp_path, picture_folder(2)).checked(
        "--max_train_steps=1", f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_at_first"
    )
    captions, *prompts = [line for line in run.warnings if "tokens" in line]
    assert captions.startswith("2 of 2 captions are longer than the 40 tokens that the text encoder takes")
    assert prompts == [
        "--sample_prompts: prompt 2 has 41 tokens, of which letters takes 40: cut off is 'y'",
        "--sample_prompts: prompt 3 has 50 tokens, of which letters takes 40: cut off is 'zzzzzzzzzz'",
    ]


def test_an_output_folder_that_is_a_file(picture_folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="--output_dir .*file is a file, not a folder: name a folder$"):
        TinyRuns(tmp_path, picture_folder(2)).checked("--max_train_steps=1", output="file")


def test_rates_that_cannot_work_are_told(picture_folder, tmp_path):
    flags = ("--max_train_steps=3", "--lr_scheduler=linear", "--lr_warmup_steps=3")
    run = TinyRuns(tmp_path, picture_folder(2)).checked(*flags, "--learning_rate=2e-6")
    rate, warmup = (warning for warning in run.warnings if warning.startswith(("--learning_rate", "--lr_")))
    assert rate.startswith("--learning_rate is 2e-06") and warmup.startswith("--lr_warmup_steps is 3, and the run has 3 steps")
