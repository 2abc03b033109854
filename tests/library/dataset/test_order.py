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
from library.dataset.order import batches_per_epoch, epoch_batches, is_flipped, rank_positions

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
        for index, occurrence in (entry for batch in epoch_batches(data, seed=7, epoch=epoch, processes=1) for entry in batch):
            showing = {"seed": 7, "epoch": epoch, "occurrence": occurrence}
            item = data.items[index]
            chosen.append([index, occurrence, is_flipped(item, **showing), caption_for(item, **showing)])
    return chosen


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("epoch", [1, 4])
def test_every_showing_appears_once(processes: int, epoch: int):
    data = training_set()
    batches = epoch_batches(data, seed=1, epoch=epoch, processes=processes)
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
    for batch in epoch_batches(data, seed=1, epoch=1, processes=processes):
        (owner,) = {(data.items[index].dataset_index, data.items[index].bucket_wh) for index, _ in batch}
        assert len(batch) <= data.datasets[owner[0]].batch_size * processes
        sizes[owner, len(batch)] += 1
    if processes == 1:
        first, narrow, second = (0, (64, 64)), (0, (32, 128)), (1, (64, 64))
        assert sizes == {(first, 2): 2, (first, 1): 1, (narrow, 2): 3, (second, 3): 4}


def test_order_depends_on_seed_and_epoch_alone():
    data = training_set()
    order = epoch_batches(data, seed=1, epoch=1, processes=1)
    assert order == epoch_batches(data, seed=1, epoch=1, processes=1)
    assert order != epoch_batches(data, seed=2, epoch=1, processes=1)
    assert [[index for index, _ in batch] for batch in order] != [
        [index for index, _ in batch] for batch in epoch_batches(data, seed=1, epoch=2, processes=1)
    ]


def test_buckets_are_mixed():
    data = training_set()
    owners = [data.items[batch[0][0]].dataset_index for batch in epoch_batches(data, seed=1, epoch=1, processes=1)]
    assert owners != sorted(owners) and owners != sorted(owners, reverse=True)


def test_more_processes_see_the_same_images_in_larger_batches():
    """One process with batch 2B and two with batch B train on the same global batches."""
    data = training_set()
    larger = tuple(replace(dataset, batch_size=2 * dataset.batch_size) for dataset in data.datasets)
    doubled = TrainingSet(datasets=larger, items=data.items)
    assert epoch_batches(data, seed=1, epoch=1, processes=2) == epoch_batches(doubled, seed=1, epoch=1, processes=1)


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
