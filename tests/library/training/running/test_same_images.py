"""Processes that have read different sets are told so; two threads stand for them here."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.errors import DatasetError
from library.training.running.same_images import require_same_images


def training_set(count: int, validation: int = 1) -> TrainingSet:
    subset = SubsetSettings(place="x", image_dir=None)
    items = [
        Item(
            index=number,
            key=f"0:0:{number}.png",
            path=Path(f"{number}.png"),
            caption=f"caption {number}",
            dataset_index=0,
            subset=subset,
            repeats=1,
            size_wh=(64, 64),
            bucket_wh=(64, 64),
            resized_wh=(64, 64),
            crop_left_top=(0, 0),
        )
        for number in range(count)
    ]
    dataset = DatasetSettings(place="x", resolution_wh=(64, 64), subsets=(subset,))
    first = count - validation
    return TrainingSet(datasets=(dataset,), items=tuple(items[:first]), validation=tuple(items[first:]))


def groups() -> list[Any]:
    values: list[Any] = [None, None]
    barrier = Barrier(2)

    def gather(rank: int) -> Callable[[Any], list[Any]]:
        def meet(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        return meet

    return [SimpleNamespace(processes=2, gather=gather(rank)) for rank in (0, 1)]


def compared(first: TrainingSet, second: TrainingSet) -> str:
    """What both say; empty where nothing is wrong."""

    def said(found: TrainingSet, group: Any) -> str:
        try:
            require_same_images(found, group)
        except DatasetError as error:
            assert error.is_found_by_all
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(said, (first, second), groups())
    assert one == other
    return one


BASE = training_set(4)


def changed(**settings: object) -> TrainingSet:
    first, second, *others = BASE.items
    return replace(BASE, items=(first, replace(second, **settings), *others))


def test_equal_sets_pass():
    assert compared(BASE, training_set(4)) == ""
    assert compared(BASE, changed(path=Path("/mnt/elsewhere/1.png"))) == ""


def test_counts_and_the_first_difference():
    fewer = replace(BASE, items=(BASE.items[0], *BASE.items[2:]))
    text = compared(BASE, fewer)
    assert "(to train + to validate: process 0: 3 + 1, process 1: 2 + 1)" in text
    assert "process 0 has 1.png (64x64 px, 1 repeats, caption 'caption 1'), process 1 has 2.png" in text


def test_one_that_is_missing_at_the_end():
    text = compared(training_set(5, validation=0), training_set(4, validation=0))
    assert "process 0 has 4.png" in text and "process 1 has no such image" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"size_wh": (64, 65)},
        {"bucket_wh": (80, 48)},
        {"repeats": 2},
        {"caption": "other"},
        {"mask_path": Path("m.png")},
        {"key": "k"},
    ],
)
def test_all_that_batches_depend_on_is_compared(settings):
    assert "process 0: 3 + 1, process 1: 3 + 1" in compared(BASE, changed(**settings))


def test_the_split_is_compared():
    assert "process 0: 3 + 1, process 1: 2 + 2" in compared(BASE, training_set(4, validation=2))


def test_a_run_of_one_process_asks_nothing():
    asked: list[object] = []
    require_same_images(BASE, SimpleNamespace(processes=1, gather=asked.append))
    assert asked == []


def test_processes_that_agree_tell_each_other_a_digest_only():
    told: list[object] = []

    def gather(value: object) -> list[object]:
        told.append(value)
        return [value, value]

    require_same_images(training_set(20_000), SimpleNamespace(processes=2, gather=gather))
    assert len(told) == 1 and len(pickle.dumps(told)) < 200  # bytes
