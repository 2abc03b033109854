"""Steps of batches, and of single showings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from library.dataset.captions import Moment
from library.dataset.clock import Clock, Moments
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.dataset.order import OrderSource


def training_set() -> TrainingSet:
    """Seven images in two buckets, shown 1 to 3 times in an epoch."""
    subset = SubsetSettings(place="test", image_dir=None)
    items = []
    for number in range(7):
        bucket = (64, 64) if number % 3 else (32, 128)
        items.append(
            Item(index=number, key=f"0:0:{number}", path=Path(f"{number}.png"), caption="", dataset_index=0, subset=subset,
                 repeats=1 + number % 3, size_wh=bucket, bucket_wh=bucket, resized_wh=bucket, crop_left_top=(0, 0)))  # fmt: skip
    return TrainingSet(
        datasets=(DatasetSettings(place="test", resolution_wh=(64, 64), batch_size=2, subsets=(subset,)),), items=tuple(items)
    )


def test_clock_counts_optimizer_steps() -> None:
    clock = Clock(accumulation=3, total_steps=50)
    steps = [clock.moment(epoch, number, batches_per_epoch=7).step for epoch in (1, 2) for number in range(7)]
    assert steps == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    assert clock.moment(2, 0, batches_per_epoch=7) == Moment(3, 50)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_showing_has_the_step_of_its_batch(processes: int, accumulation: int) -> None:
    data, clock = training_set(), Clock(accumulation, total_steps=40)
    orders = OrderSource(data, seed=5, processes=processes)
    expected = {
        entry: clock.moment(epoch, number, batches_per_epoch=len(order))
        for epoch in (1, 2, 3)
        for order in [orders.epoch(epoch)]
        for number, batch in enumerate(order)
        for entry in batch
    }
    assert len(expected) == 3 * sum(item.repeats for item in data.items)
    assert len(set(expected.values())) > 3
    moments = Moments(data, clock, seed=5, processes=processes)
    entries = sorted(expected, key=lambda entry: (entry[1], -entry[0]), reverse=True)  # in an order of their own
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda entry: moments.of(*entry), entries)) == [expected[entry] for entry in entries]
