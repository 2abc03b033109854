from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.batch import Batch, normalized_pixels
from library.dataset.captions import caption_for, caption_variant
from library.dataset.images import load_pixels
from library.dataset.items import TrainingSet
from library.dataset.loader import BatchSource
from library.dataset.order import batches_per_epoch, epoch_batches, is_flipped
from tests.library.dataset.cache_parts import TinyTextEncoder, TinyVae, latent_cache, make_training_set, text_cache


def source(training_set: TrainingSet, **settings: Any) -> BatchSource:
    return BatchSource(training_set, **{"seed": 3, **settings})


def first(source: BatchSource, count: int, *, epoch: int = 1, index: int = 0, workers: int = 0) -> list[tuple]:
    with source.batches(epoch, index, workers=workers) as batches:
        return list(itertools.islice(batches, count))


def assert_same(one: list[tuple], other: list[tuple]) -> None:
    assert [entry[:2] for entry in one] == [entry[:2] for entry in other]
    for (_, _, a), (_, _, b) in zip(one, other, strict=True):
        assert (a.captions, a.item_keys, a.positions, a.global_size) == (b.captions, b.item_keys, b.positions, b.global_size)
        for name in ("pixels", "latents", "loss_weights"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or torch.equal(x, y)
        assert (a.text is None and b.text is None) or torch.equal(a.text.embeds, b.text.embeds)


def cached_source(training_set: TrainingSet, *, on_disk: bool = True, variants: int = 4, **settings: Any) -> BatchSource:
    latents = latent_cache(training_set, on_disk=on_disk)
    latents.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    text = text_cache(training_set, on_disk=on_disk, variants=variants)
    text.fill(TinyTextEncoder(), batch_size=2, progress=False)
    return source(training_set, latent_cache=latents, text_cache=text, **settings)


def test_live_batches_carry_pixels_and_captions(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, flip_aug=True, shuffle_caption=True, num_repeats=3)
    live = source(training_set)
    for index, entries in enumerate(epoch_batches(training_set, seed=3, epoch=2, processes=1)):
        batch = live.micro_batch(2, index)
        assert batch.latents is None
        assert batch.text is None
        assert batch.pixels.dtype == torch.float32
        assert batch.pixels.abs().max() <= 1
        assert batch.positions == tuple(range(len(entries)))
        for row, (position, occurrence) in enumerate(entries):
            item, when = training_set.items[position], {"seed": 3, "epoch": 2, "occurrence": occurrence}
            assert batch.captions[row] == caption_for(item, **when)
            expected = normalized_pixels([load_pixels(item, flipped=is_flipped(item, **when))])
            assert torch.equal(batch.pixels[row : row + 1], torch.from_numpy(expected))


def test_normalized_pixels_span_minus_one_to_one() -> None:
    import numpy as np

    picture = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    pixels = normalized_pixels([picture])
    assert pixels.shape == (1, 3, 16, 16)
    assert np.array_equal(pixels[0, 0].ravel(), np.arange(256, dtype=np.float32) / np.float32(127.5) - 1)


@pytest.mark.parametrize("cached", [False, True])
def test_workers_do_not_change_batches(tmp_path: Path, cached: bool) -> None:
    training_set = make_training_set(tmp_path, flip_aug=True, shuffle_caption=True, caption_dropout_rate=0.3)
    make = cached_source if cached else source
    expected = first(make(training_set), 10)
    assert {epoch for epoch, _, _ in expected} == {1, 2, 3, 4}
    for workers in (1, 4):
        assert_same(first(make(training_set), 10, workers=workers), expected)


def test_starting_in_the_middle_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, flip_aug=True, shuffle_caption=True)
    per_epoch = batches_per_epoch(training_set, processes=1)
    whole = first(source(training_set), 3 * per_epoch)
    assert_same(first(source(training_set), per_epoch, epoch=2, index=1, workers=2), whole[per_epoch + 1 : 2 * per_epoch + 1])
    after_the_end = first(source(training_set), 1, epoch=1, index=per_epoch)
    assert_same(after_the_end, whole[per_epoch : per_epoch + 1])


@pytest.mark.parametrize("on_disk", [True, False])
def test_cached_batches_carry_latents_and_text(tmp_path: Path, on_disk: bool) -> None:
    training_set = make_training_set(tmp_path, flip_aug=True, shuffle_caption=True, caption_dropout_rate=0.4, num_repeats=4)
    cached, live = cached_source(training_set, on_disk=on_disk), source(training_set)
    dropped = 0
    for index in range(batches_per_epoch(training_set, processes=1)):
        batch, same = cached.micro_batch(1, index), live.micro_batch(1, index)
        assert batch.pixels is None
        assert batch.latents.dtype == torch.bfloat16
        assert torch.equal(batch.latents, TinyVae()(same.pixels).to(torch.bfloat16))
        for row, caption in enumerate(batch.captions):
            item = next(item for item in training_set.items if item.key == batch.item_keys[row])
            assert (caption == "") == (same.captions[row] == "")  # dropout is the same with and without caches
            dropped += caption == ""
            assert caption in {"", *(caption_variant(item, variant) for variant in range(4))}
            own = TinyTextEncoder.one(caption)
            rows = len(caption)
            assert torch.equal(batch.text.embeds[row, :rows], own.embeds[0])
            assert batch.text.mask[row].sum() == rows
    assert 0 < dropped < 20


def test_the_dropout_rate_can_change_with_a_warm_cache(tmp_path: Path) -> None:
    cached_source(make_training_set(tmp_path))
    training_set = make_training_set(tmp_path, caption_dropout_rate=1.0)
    text = text_cache(training_set)
    assert text.state().is_complete
    batch = source(training_set, text_cache=text).micro_batch(1, 0)
    assert set(batch.captions) == {""}
    assert not batch.text.mask.any()


def test_two_processes_split_each_global_batch(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 5, batch_size=2)
    ranks = [source(training_set, rank=rank, processes=2) for rank in (0, 1)]
    for index, entries in enumerate(epoch_batches(training_set, seed=3, epoch=1, processes=2)):
        shares = [rank.micro_batch(1, index) for rank in ranks]
        there = [share for share in shares if share is not None]
        assert sum((share.positions for share in there), ()) == tuple(range(len(entries)))
        assert {share.global_size for share in there} == {len(entries)}
        keys = [key for share in there for key in share.item_keys]
        assert keys == [training_set.items[position].key for position, _ in entries]


def test_a_process_without_images_gets_none(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    assert isinstance(source(training_set, rank=0, processes=2).micro_batch(1, 0), Batch)
    assert source(training_set, rank=1, processes=2).micro_batch(1, 0) is None


def test_regularization_images_weigh_less(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 2)
    regularization = replace(training_set.items[1], subset=replace(training_set.items[1].subset, is_reg=True))
    training_set = replace(training_set, items=(training_set.items[0], regularization))
    weights = {}
    for _, _, batch in first(source(training_set, prior_loss_weight=0.25), 2):
        weights.update(zip(batch.item_keys, batch.loss_weights.tolist(), strict=True))
    assert weights == {"0:0:a.png": 1.0, "0:0:b.PNG": 0.25}


def test_only_the_latest_epochs_are_kept(tmp_path: Path) -> None:
    live = source(make_training_set(tmp_path))
    for epoch in (1, 2, 3, 1):
        live.micro_batch(epoch, 0)
    assert len(live._orders) <= 3
    assert 3 in live._orders
