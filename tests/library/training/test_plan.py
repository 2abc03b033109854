"""What the plan says, of runs of the fake architecture that are checked and not started."""

from __future__ import annotations

import pytest

from library.dataset.page.facts import dataset_facts
from library.dataset.page.text import dataset_lines
from library.training.plan import NetworkSize, plan_lines
from tests.tiny_runs import TinyRuns

CACHED = "--cache_text_encoder_outputs"


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(4))


def caption_lines(runs: TinyRuns, *flags: str) -> list[str]:
    lines = plan_lines(runs.checked(CACHED, *flags), NetworkSize(1, 2, 3))
    return [line.strip() for line in lines if "variant" in line]


def test_captions_that_never_change_have_no_variants(runs):
    assert caption_lines(runs) == []
    assert caption_lines(runs, "--caption_variants=5") == [
        "captions: none of them ever changes, so one variant of each is cached (--caption_variants does nothing)"
    ]


def test_only_captions_that_change_are_counted(runs, picture_folder):
    others = picture_folder(3, name="others")
    for number, path in enumerate(sorted(others.glob("*.txt"))):
        path.write_text("one" if number == 0 else "{red|green} sky" if number == 1 else "a, b, c, d")
    shuffled = runs.images_of(others, "shuffle_caption = true", "enable_wildcard = true", "num_repeats = 2")
    plain = runs.images_of(runs.pictures, "num_repeats = 50", "is_reg = true")
    runs.write_dataset(plain, shuffled)
    told = caption_lines(runs, "--max_train_epochs=4", "--caption_variants=3")
    # a caption of one tag never changes, one of two kinds is cached whole; four tags have 24 orders, in 8 showings
    assert told == [
        "captions: up to 3 variants of 2 captions are cached (--caption_variants)",
        "1 image would have more: shown up to 8 times, so that variants come back; "
        "a larger --caption_variants needs more room and time to cache",
    ]
    assert len(caption_lines(runs, "--max_train_epochs=4")) == 1  # by default enough for all


def test_datasets_are_described_as_the_page_does(runs, picture_folder):
    runs.write_dataset(
        runs.images_of(runs.pictures, "num_repeats = 3"), runs.images_of(picture_folder(2, name="reg"), "is_reg = true")
    )
    run = runs.checked()
    (dataset,) = dataset_facts(run.training_set, processes=1)
    lines = [f"  {line}" for line in dataset_lines(dataset)]
    assert plan_lines(run, NetworkSize(1, 2, 3))[2 : 2 + len(lines)] == lines
    assert "4 images, 12 with repeats; 2 for regularisation, 12 with repeats" in lines[1]


def test_how_often_is_validated(runs):
    lines = plan_lines(runs.checked("--validation_split=0.4", "--max_train_epochs=1"), NetworkSize(1, 2, 3))
    (line,) = [line for line in lines if line.startswith("  validation")]
    assert line.endswith("the base model once before training, the LoRA after every epoch, and at the end: once")


def test_counts_of_one_are_told_as_one(runs):
    flags = ("--validation_split=0.3", "--min_timestep=500", "--max_timestep=501", "--max_train_steps=3")
    runs.write_dataset(dataset="batch_size = 8")
    text = "\n".join(plan_lines(runs.checked(*flags), NetworkSize(1, 2, 3)))
    assert "validation: 1 image, 1 batch at 1 timestep each: " in text
    lines = plan_lines(runs.checked(*flags[1:], "--gradient_accumulation_steps=9"), NetworkSize(1, 2, 3))
    assert any(
        "steps: 3 batches per epoch, 9 batches a step, 1 step per epoch, 3 epochs, 3 steps in all" in line for line in lines
    )


def test_the_plan_tells_what_is_trained(runs):
    size = NetworkSize(1, 2, 3, "  trained: denoiser: 1 module at 0.01")
    assert size.trained in plan_lines(runs.checked(CACHED), size)


def test_the_plan_tells_model_optimizer_and_what_is_cached(runs):
    lines = plan_lines(runs.checked(CACHED, "--lr_scheduler=cosine_with_restarts", "--lr_warmup_steps=2"), NetworkSize(1, 2, 3))
    assert lines[1] == "  model: tiny"
    assert "  optimizer: AdamW; learning rate schedule: cosine_with_restarts, lr_warmup_steps=2; precision: float32" in lines
    (texts,) = [line for line in lines if line.startswith("  text outputs")]
    assert "4 captions and the empty one" in texts and "5 to be cached" in texts
    prompts = runs.folder / "prompts.txt"
    prompts.write_text("a cat --n dark")
    lines = plan_lines(runs.checked("--cache_text_encoder_outputs_to_disk", f"--sample_prompts={prompts}"), NetworkSize(1, 2, 3))
    assert any(
        "0 of 7 cached on disk" in line and line.endswith(" (4 captions, 2 texts of sample pictures and the empty one)")
        for line in lines
    )


def test_schedules_of_the_optimizer_and_of_others_are_named(runs, monkeypatch):
    monkeypatch.setattr("library.training.optimizing.optimizer_names._package_problems", lambda source: ())
    told = {
        flags: [line for line in plan_lines(runs.checked(*flags.split()), NetworkSize(1, 2, 3)) if "optimizer:" in line]
        for flags in ("--optimizer_type=AdamWScheduleFree", "--lr_scheduler_type=StepLR --lr_scheduler_args step_size=2")
    }
    schedules = [line.partition("schedule: ")[2].partition(";")[0] for (line,) in told.values()]
    assert schedules == ["the optimizer's own", "StepLR"]
