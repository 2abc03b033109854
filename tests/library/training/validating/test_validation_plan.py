"""When a run validates, and at which timesteps."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.options.validation import ValidationOptions
from library.training.steps import Progress, RunLength
from library.training.validating.validation_plan import (
    ValidationSchedule,
    validation_batch_count,
    validation_timesteps,
)

LENGTH = RunLength(batches_per_epoch=5, accumulation=2, total_steps=10)  # 3 steps an epoch


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1000, (200, 400, 600, 800)),
        (0, 500, (100, 200, 300, 400)),
        (600, 1000, (680, 760, 840, 920)),
        (0, 999, (199, 399, 599, 799)),  # as torch.linspace(0, 999, 6, dtype=torch.int) counts
        (100, 102, (100, 101)),
        (500, 501, (500,)),
    ],
)
def test_four_timesteps_inside_the_range(low, high, expected):
    assert validation_timesteps(low, high) == expected


def schedule(**options: object) -> ValidationSchedule:
    return ValidationSchedule.of(ValidationOptions(**options))


def due(when: ValidationSchedule) -> dict[int, tuple[str, ...]]:
    found = {step: when.due(Progress(step, step), LENGTH) for step in range(LENGTH.total_steps + 1)}
    return {step: kinds for step, kinds in found.items() if kinds}


def test_after_every_epoch():
    assert due(schedule()) == {3: ("epoch",), 6: ("epoch",), 9: ("epoch",), 10: ("epoch",)}
    assert due(schedule(validate_every_n_epochs=2)) == {6: ("epoch",), 10: ("epoch",)}


def test_after_steps_as_well():
    when = schedule(validate_every_n_steps=3, validate_every_n_epochs=2)
    assert due(when) == {3: ("step",), 6: ("step", "epoch"), 9: ("step",), 10: ("epoch",)}


@pytest.mark.parametrize(
    "options", [{}, {"validate_every_n_steps": 2}, {"validate_every_n_steps": 3}, {"validate_every_n_epochs": 4}]
)
def test_the_plan_counts_the_validations(options):
    assert schedule(**options).times(LENGTH) == len(due(schedule(**options)))


def images(count: int, bucket_wh: tuple[int, int], *, first: int = 0) -> list[Item]:
    subset = SubsetSettings(place="x", image_dir=None)
    return [
        Item(
            index=first + number,
            key=str(number),
            path=Path("x"),
            caption="",
            dataset_index=0,
            subset=subset,
            repeats=1,
            size_wh=bucket_wh,
            bucket_wh=bucket_wh,
            resized_wh=bucket_wh,
            crop_left_top=(0, 0),
        )
        for number in range(count)
    ]


def training_set(validation: list[Item]) -> TrainingSet:
    dataset = DatasetSettings(place="x", resolution_wh=(64, 64), batch_size=2, subsets=())
    return TrainingSet(datasets=(dataset,), items=(), validation=tuple(validation))


def test_batches_are_of_one_bucket():
    found = training_set(images(3, (64, 64)) + images(1, (48, 80)))
    assert validation_batch_count(found, None) == 3
    assert validation_batch_count(found, 2) == 2
