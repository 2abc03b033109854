"""Which images form which batch: a pure function of (seed, epoch), the same for any number of workers and after any resume.

An *entry* is one showing of one image. Its occurrence counts the image's showings over the whole run, so that caption
shuffling, dropout and flips differ from one showing to the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from library.dataset.items import Item, TrainingSet
from library.randomness import python_random

Entry = tuple[int, int]  # (position in TrainingSet.items, occurrence: 0, 1, 2 ... over the run)
Bucket = tuple[int, tuple[int, int]]  # (dataset, (width, height)): the images that can share a batch


def epoch_batches(training_set: TrainingSet, *, seed: int, epoch: int, processes: int) -> list[tuple[Entry, ...]]:
    """The global batches of one epoch, in training order.

    A global batch holds batch_size * ``processes`` entries of one bucket of one dataset; a bucket's last batch holds what is
    left, so every entry appears exactly once. ``epoch`` is 1-based.
    """
    batches: list[tuple[Entry, ...]] = []
    for (dataset_index, bucket_wh), items in items_by_bucket(training_set.items).items():
        entries = [entry for item in items for entry in _entries(item, epoch)]
        python_random("order in bucket", seed, epoch, dataset_index, *bucket_wh).shuffle(entries)
        size = training_set.datasets[dataset_index].batch_size * processes
        batches += [tuple(entries[start : start + size]) for start in range(0, len(entries), size)]
    python_random("order of batches", seed, epoch).shuffle(batches)
    return batches


def batches_per_epoch(training_set: TrainingSet, *, processes: int) -> int:
    """``len(epoch_batches(...))``, which is the same for every seed and epoch."""
    total = 0
    for (dataset_index, _), items in items_by_bucket(training_set.items).items():
        size = training_set.datasets[dataset_index].batch_size * processes
        total += -(-sum(item.repeats for item in items) // size)
    return total


def rank_positions(size: int, *, rank: int, processes: int) -> range:
    """The places of a global batch of ``size`` entries that process ``rank`` trains: contiguous, as even as can be.

    Empty where there are more processes than entries.
    """
    share, extra = divmod(size, processes)
    start = rank * share + min(rank, extra)
    return range(start, start + share + (rank < extra))


def is_flipped(item: Item, *, seed: int, epoch: int, occurrence: int) -> bool:
    """Whether this showing is mirrored: half of them where flip_aug is on."""
    return item.subset.flip_aug and python_random("flip", seed, item.key, epoch, occurrence).random() < 0.5


def items_by_bucket(items: Iterable[Item]) -> dict[Bucket, list[Item]]:
    """The items of each bucket in their fixed order; buckets in the order of (dataset, width, height)."""
    buckets: dict[Bucket, list[Item]] = defaultdict(list)
    for item in items:
        buckets[item.dataset_index, item.bucket_wh].append(item)
    return dict(sorted(buckets.items()))


def _entries(item: Item, epoch: int) -> list[Entry]:
    first = (epoch - 1) * item.repeats
    return [(item.index, first + repeat) for repeat in range(item.repeats)]
