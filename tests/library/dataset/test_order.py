"""The order of training: complete, of one bucket per batch, and a pure function of seed and epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from library.dataset.captions import caption_for
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.dataset.order import OrderSource, batches_per_epoch, is_flipped, rank_positions, validation_batches

ROOT = Path(__file__).parents[3]


def training_set() -> TrainingSet:
    """Two datasets (batch 2 and 3), buckets of 5, 3 and 4 images, repeats 1, 2 and 3."""
    subset = SubsetSettings(place="test", image_dir=None, flip_aug=True, shuffle_caption=True)
    datasets = tuple(DatasetSettings(place="test", resolution_wh=(64, 64), batch_size=size, subsets=(subset,)) for size in (2, 3))
    layout = [(0, (64, 64), 5, 1), (0, (32, 128), 3, 2), (1, (64, 64), 4, 3)]
    items: list[Item] = []
    for dataset_index, bucket, count, repeats in layout:
        for _ in range(count):
            number = len(items)
            items.append(
                Item(index=number, key=f"{dataset_index}:0:絵{number}.png", path=Path(f"{number}.png"), caption="a, b, c, d, e",
                     dataset_index=dataset_index, subset=subset, repeats=repeats, size_wh=bucket, bucket_wh=bucket,
                     resized_wh=bucket, crop_left_top=(0, 0)))  # fmt: skip
    return TrainingSet(datasets=datasets, items=tuple(items))


def one_run() -> list:
    """All random choices of two epochs, for comparison between processes."""
    data = training_set()
    chosen = []
    for epoch in (1, 2):
        for index, occurrence in (entry for batch in OrderSource(data, seed=7, processes=1).epoch(epoch) for entry in batch):
            showing = {"seed": 7, "epoch": epoch, "occurrence": occurrence}
            item = data.items[index]
            chosen.append([index, occurrence, is_flipped(item, **showing), caption_for(item, **showing)])
    return chosen


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("epoch", [1, 4])
def test_every_showing_appears_once(processes: int, epoch: int):
    data = training_set()
    batches = OrderSource(data, seed=1, processes=processes).epoch(epoch)
    entries = [entry for batch in batches for entry in batch]
    assert len(set(entries)) == len(entries)
    assert Counter(index for index, _ in entries) == {item.index: item.repeats for item in data.items}
    for item in data.items:
        occurrences = sorted(occurrence for index, occurrence in entries if index == item.index)
        assert occurrences == [(epoch - 1) * item.repeats + repeat for repeat in range(item.repeats)]
    assert len(batches) == batches_per_epoch(data, processes=processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_is_of_one_bucket_and_of_its_size(processes: int):
    data = training_set()
    sizes = Counter()
    for batch in OrderSource(data, seed=1, processes=processes).epoch(1):
        (owner,) = {(data.items[index].dataset_index, data.items[index].bucket_wh) for index, _ in batch}
        assert len(batch) <= data.datasets[owner[0]].batch_size * processes
        sizes[owner, len(batch)] += 1
    if processes == 1:
        first, narrow, second = (0, (64, 64)), (0, (32, 128)), (1, (64, 64))
        assert sizes == {(first, 2): 2, (first, 1): 1, (narrow, 2): 3, (second, 3): 4}


def test_order_depends_on_seed_and_epoch_alone():
    data = training_set()
    order = OrderSource(data, seed=1, processes=1).epoch(1)
    assert order == OrderSource(data, seed=1, processes=1).epoch(1)
    assert order != OrderSource(data, seed=2, processes=1).epoch(1)
    assert [[index for index, _ in batch] for batch in order] != [
        [index for index, _ in batch] for batch in OrderSource(data, seed=1, processes=1).epoch(2)
    ]


def test_buckets_are_mixed():
    data = training_set()
    owners = [data.items[batch[0][0]].dataset_index for batch in OrderSource(data, seed=1, processes=1).epoch(1)]
    assert owners != sorted(owners) and owners != sorted(owners, reverse=True)


def test_more_processes_see_the_same_images_in_larger_batches():
    """One process with batch 2B and two with batch B train on the same global batches."""
    data = training_set()
    larger = tuple(replace(dataset, batch_size=2 * dataset.batch_size) for dataset in data.datasets)
    doubled = TrainingSet(datasets=larger, items=data.items)
    assert OrderSource(data, seed=1, processes=2).epoch(1) == OrderSource(doubled, seed=1, processes=1).epoch(1)


@pytest.mark.parametrize(
    ("size", "processes", "shares"), [(8, 4, [2, 2, 2, 2]), (5, 2, [3, 2]), (2, 4, [1, 1, 0, 0]), (1, 1, [1])]
)
def test_ranks_split_a_batch_evenly(size: int, processes: int, shares: list[int]):
    parts = [rank_positions(size, rank=rank, processes=processes) for rank in range(processes)]
    assert [len(part) for part in parts] == shares
    assert [position for part in parts for position in part] == list(range(size))


def test_half_of_the_showings_are_flipped():
    item = training_set().items[0]
    flipped = [is_flipped(item, seed=1, epoch=1, occurrence=occurrence) for occurrence in range(1000)]
    assert 430 < sum(flipped) < 570


def test_an_order_can_be_read_like_a_list():
    order = OrderSource(training_set(), seed=1, processes=1).epoch(2)
    batches = list(order)
    assert len(order) == len(batches)
    assert (order[0], order[-1], order[2:5]) == (batches[0], batches[-1], batches[2:5])
    with pytest.raises(IndexError):
        order[len(order)]


def test_epochs_can_be_asked_for_in_any_order():
    source = OrderSource(training_set(), seed=1, processes=2)
    for epoch in (3, 1, 2, 3):
        assert source.epoch(epoch) == OrderSource(training_set(), seed=1, processes=2).epoch(epoch)


def test_the_order_of_a_big_set_is_small():
    """100,000 images in 40 buckets; the limit is many times what it takes."""
    sizes = [(64 * width, 64 * (41 - width)) for width in range(1, 41)]
    example = training_set().items[0]
    items = tuple(replace(example, index=index, bucket_wh=sizes[index % 40]) for index in range(100_000))
    source = OrderSource(replace(training_set(), items=items), seed=1, processes=1)
    order = source.epoch(1)
    held = sum(sys.getsizeof(numbers) for numbers in (order.positions, order.occurrences, order.starts, order.ends))
    assert held < 20 * len(items)  # bytes


def with_validation(counts: tuple[int, ...] = (7, 5)) -> TrainingSet:
    """The set above and ``counts`` validation images in two buckets of dataset 0 (batch 2)."""
    data = training_set()
    first = len(data.items)
    buckets = [bucket for bucket, count in zip([(64, 64), (32, 128)], counts, strict=True) for _ in range(count)]
    validation = [
        replace(data.items[0], index=first + number, key=f"0:1:{number}.png", bucket_wh=bucket, repeats=1)
        for number, bucket in enumerate(buckets)
    ]
    return replace(data, validation=tuple(validation))


def test_validation_shows_each_image_once_in_batches_of_one_bucket():
    data = with_validation()
    batches = validation_batches(data, seed=4)
    assert sorted(position for batch in batches for position in batch) == list(range(12))
    assert sorted(len(batch) for batch in batches) == [1, 1, 2, 2, 2, 2, 2]
    for batch in batches:
        assert len({data.validation[position].bucket_wh for position in batch}) == 1
    assert validation_batches(training_set(), seed=4) == []


def test_the_order_of_validation_depends_on_the_seed_alone_and_mixes_buckets():
    data = with_validation((60, 60))
    batches = validation_batches(data, seed=4)
    assert batches == validation_batches(data, seed=4)
    assert batches != validation_batches(data, seed=5)
    wide = [data.validation[batch[0]].bucket_wh == (64, 64) for batch in batches[:20]]
    assert 5 <= sum(wide) <= 15
    assert max(position for batch in batches[:10] for position in batch if position < 60) > 20  # not the first by name


def test_validation_images_are_not_in_the_order_of_training():
    data = with_validation()
    assert OrderSource(data, seed=1, processes=1).epoch(1) == OrderSource(training_set(), seed=1, processes=1).epoch(1)
    assert batches_per_epoch(data, processes=1) == batches_per_epoch(training_set(), processes=1)


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_makes_the_same_choices(hash_seed: str):
    code = (
        "import json, sys, importlib.util as util\n"
        f"spec = util.spec_from_file_location('choices', {str(Path(__file__))!r}); module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); sys.stdout.write(json.dumps(module.one_run()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == one_run()
