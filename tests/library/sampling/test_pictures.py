"""Sample pictures: when, under which name, and what the file holds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import OutputError
from library.sampling.picture_plan import Picture
from library.sampling.pictures import (
    dated_stem,
    free_stem,
    is_due,
    no_picture_warning,
    picture_name,
    picture_parameters,
    save_picture,
)

NOW = time.struct_time((2026, 1, 31, 9, 5, 7, 5, 31, 0))


@dataclass(frozen=True)
class Times:
    sample_at_first: bool = False
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None


def due_calls(times, *, steps=6, steps_per_epoch=2):
    """The (step, epoch) calls of a run that draw."""
    calls = [(0, 0)]
    for step in range(1, steps + 1):
        calls.append((step, None))
        if step % steps_per_epoch == 0:
            calls.append((step, step // steps_per_epoch))
    return [(step, epoch) for step, epoch in calls if is_due(times, step=step, epoch=epoch)]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (Times(), []),
        (Times(sample_at_first=True), [(0, 0)]),
        (Times(sample_every_n_steps=3), [(3, None), (6, None)]),
        (Times(sample_every_n_epochs=2), [(4, 2)]),
        (Times(sample_every_n_epochs=1, sample_every_n_steps=1), [(2, 1), (4, 2), (6, 3)]),
        (Times(sample_every_n_epochs=0, sample_every_n_steps=-1), []),
        (Times(sample_every_n_epochs=-1, sample_every_n_steps=6, sample_at_first=True), [(0, 0), (6, None)]),
    ],
)
def test_is_due(times, expected):
    assert due_calls(times) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"output_name": "my", "step": 40, "epoch": 2, "seed": 42}, "my_e000002_03_20260131090507_42.png"),
        ({"output_name": "my", "step": 40, "epoch": None, "seed": None}, "my_000040_03_20260131090507.png"),
        ({"output_name": None, "step": 0, "epoch": 0, "seed": 0}, "e000000_03_20260131090507_0.png"),
    ],
)
def test_picture_name(arguments, expected):
    assert picture_name(**arguments, index=3, now=NOW) == expected


def test_save_picture_keeps_pixels_and_tells_the_prompt(tmp_path):
    pixels = torch.linspace(-1.2, 1.2, 3 * 4 * 6).reshape(3, 4, 6)
    plan = Picture(
        prompt="猫, a cat", negative_prompt="blurry", width=6, height=4, seed=5, steps=8, scale=3.5, shift=3.0, sampler="euler"
    )
    save_picture(pixels, tmp_path / "sample" / "a.png", picture_parameters(plan, {}))
    picture = Image.open(tmp_path / "sample" / "a.png")
    assert picture.size == (6, 4) and picture.mode == "RGB"
    expected = np.rint((pixels.clamp(-1, 1).numpy() + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(picture), expected)
    assert picture.text["parameters"] == (
        "猫, a cat\nNegative prompt: blurry\nSteps: 8, Sampler: euler, CFG scale: 3.5, Seed: 5, Shift: 3, Size: 6x4"
    )


def test_values_that_are_no_numbers_are_reported(tmp_path, caplog):
    pixels = torch.full((3, 2, 2), float("nan"))
    save_picture(pixels.bfloat16(), tmp_path / "nan.png")
    assert "nan.png" in caplog.text
    assert set(np.asarray(Image.open(tmp_path / "nan.png")).ravel()) == {128}


def test_a_name_that_is_taken_by_a_folder_is_an_output_error(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match="a.png"):
        save_picture(torch.zeros(3, 2, 2), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_values_with_commas_are_quoted_and_a_negative_without_guidance_is_left_out():
    picture = Picture(
        prompt="a cat", negative_prompt="rain", width=64, height=96, seed=5, steps=8, scale=1.0, shift=2.5, sampler="er_sde"
    )
    text = picture_parameters(picture, {"Model": "my, model: 2.safetensors"})
    assert text == (
        'a cat\nSteps: 8, Sampler: er_sde, CFG scale: 1, Seed: 5, Shift: 2.5, Size: 64x96, Model: "my, model: 2.safetensors"'
    )


def test_names_have_milliseconds_and_are_not_taken(tmp_path):
    moment = time.mktime((2026, 1, 31, 9, 5, 7, 5, 31, -1)) + 0.042
    stem = dated_stem(7, moment)
    assert stem == "20260131-090507-042_7"
    assert free_stem(tmp_path, stem, [".png"]) == stem
    (tmp_path / f"{stem}_latent.safetensors").touch()
    (tmp_path / f"{stem}-2.png").touch()
    assert free_stem(tmp_path, stem, [".png"]) == stem
    assert free_stem(tmp_path, stem, [".png", "_latent.safetensors"]) == f"{stem}-3"


@pytest.mark.parametrize(
    ("times", "steps", "epochs", "told"),
    [
        (Times(), range(1, 3), range(1, 2), None),
        (Times(sample_every_n_epochs=1), range(1, 3), range(1, 2), None),
        (Times(sample_every_n_epochs=2, sample_every_n_steps=1), range(1, 3), range(1, 2), "epochs is 2, and this run ends epochs 1 to 1:"),
        (Times(sample_every_n_epochs=2, sample_at_first=True), range(1, 3), range(1, 2), None),
        (Times(sample_every_n_epochs=4, sample_at_first=True), range(9, 20), range(5, 8), "epochs is 4, and this run ends epochs 5 to 7:"),
        (Times(sample_every_n_steps=1000), range(1, 1000), range(1, 9), "steps is 1,000, and this run ends steps 1 to 999:"),
        (Times(sample_every_n_steps=1000), range(1, 1001), range(1, 9), None),
    ],
)  # fmt: skip
def test_runs_without_any_picture_are_told(times, steps, epochs, told):
    warnings = list(no_picture_warning(times, steps, epochs))
    assert len(warnings) == (told is not None)
    assert not warnings or warnings[0].startswith(f"no picture will be drawn: --sample_every_n_{told}")
