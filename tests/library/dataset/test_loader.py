from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.augment import colours_for, placement_for
from library.dataset.batch import Batch, normalized_pixels
from library.dataset.captions import Moment, caption_for, caption_variant
from library.dataset.clock import Clock
from library.dataset.images import load_picture
from library.dataset.items import Item, TrainingSet
from library.dataset.loader import BatchSource, ValidationBatches
from library.dataset.order import Entry, OrderSource, batches_per_epoch, is_flipped
from library.dataset.showing import TrainingShowing, When
from library.dataset.validation_split import without_chance
from library.errors import DatasetError
from tests.library.dataset.caches.cache_parts import (
    TinyTextEncoder,
    TinyVae,
    changed,
    draw,
    latent_cache,
    make_training_set,
    text_cache,
)

TENSORS = ("pixels", "latents", "mask", "loss_weights", "original_wh", "crop_left_top")
FACTS = ("captions", "item_keys", "positions", "global_size", "target_wh", "network_multiplier", "custom_attributes")


def source(training_set: TrainingSet, **settings: Any) -> BatchSource:
    return BatchSource(training_set, **{"seed": 3, **settings})


def first(source: BatchSource, count: int, *, epoch: int = 1, index: int = 0, workers: int = 0) -> list[tuple]:
    with source.batches(epoch, index, workers=workers) as batches:
        return list(itertools.islice(batches, count))


def batch_of(source: BatchSource, epoch: int, index: int) -> Batch | None:
    return first(source, 1, epoch=epoch, index=index)[0][2]


def assert_same(one: list[tuple], other: list[tuple]) -> None:
    assert [entry[:2] for entry in one] == [entry[:2] for entry in other]
    for (_, _, a), (_, _, b) in zip(one, other, strict=True):
        assert_same_batch(a, b)


def assert_same_batch(a: Batch, b: Batch) -> None:
    assert [getattr(a, name) for name in FACTS] == [getattr(b, name) for name in FACTS]
    for name in TENSORS:
        assert_equal_or_none(getattr(a, name), getattr(b, name))
    assert (a.text is None and b.text is None) or torch.equal(a.text.embeds, b.text.embeds)


def assert_equal_or_none(x: torch.Tensor | None, y: torch.Tensor | None) -> None:
    assert (x is None and y is None) or torch.equal(x, y)


def cached_source(training_set: TrainingSet, *, on_disk: bool = True, variants: int = 4, **settings: Any) -> BatchSource:
    return source(training_set, **filled_caches(training_set, on_disk=on_disk, variants=variants), **settings)


def filled_caches(training_set: TrainingSet, *, on_disk: bool = True, variants: int = 4) -> dict[str, Any]:
    latents = latent_cache(training_set, on_disk=on_disk)
    latents.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    text = text_cache(training_set, on_disk=on_disk, variants=variants)
    text.fill(TinyTextEncoder(), batch_size=2, progress=False)
    return {"latent_cache": latents, "text_cache": text}


def masked(training_set: TrainingSet, folder: Path, positions: tuple[int, ...]) -> TrainingSet:
    """The set with a mask image for some of its images."""
    folder.mkdir()
    for position in positions:
        path = folder / f"{position}.png"
        draw(path, training_set.items[position].size_wh, seed=100 + position)
        training_set = changed(training_set, position, mask_path=path)
    return training_set


def test_live_batches_carry_pixels_and_captions(tmp_path: Path) -> None:
    training_set = make_training_set(
        tmp_path, flip_aug=True, color_aug=True, random_crop=True, shuffle_caption=True, num_repeats=3
    )
    items = (replace(item, bucket_wh=(48, 48)) for item in training_set.items)
    training_set = replace(training_set, items=tuple(items))
    live = source(training_set)
    for index, entries in enumerate(OrderSource(training_set, seed=3, processes=1).epoch(2)):
        batch = batch_of(live, 2, index)
        assert batch.latents is None
        assert batch.text is None
        assert batch.pixels.dtype == torch.float32
        assert batch.pixels.abs().max() <= 1
        assert batch.positions == tuple(range(len(entries)))
        for row, (position, occurrence) in enumerate(entries):
            item, when = training_set.items[position], {"seed": 3, "epoch": 2, "occurrence": occurrence}
            assert batch.captions[row] == caption_for(item, **when)
            placement, colours, flipped = placement_for(item, **when), colours_for(item, **when), is_flipped(item, **when)
            picture = load_picture(item, placement=placement, colours=colours, flipped=flipped)
            expected = normalized_pixels([picture.pixels])
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
        batch, same = batch_of(cached, 1, index), batch_of(live, 1, index)
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
    batch = batch_of(source(training_set, text_cache=text), 1, 0)
    assert set(batch.captions) == {""}
    assert not batch.text.mask.any()


def test_two_processes_split_each_global_batch(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 5, batch_size=2)
    ranks = [source(training_set, rank=rank, processes=2) for rank in (0, 1)]
    for index, entries in enumerate(OrderSource(training_set, seed=3, processes=2).epoch(1)):
        shares = [batch_of(rank, 1, index) for rank in ranks]
        there = [share for share in shares if share is not None]
        assert sum((share.positions for share in there), ()) == tuple(range(len(entries)))
        assert {share.global_size for share in there} == {len(entries)}
        keys = [key for share in there for key in share.item_keys]
        assert keys == [training_set.items[position].key for position, _ in entries]


def test_a_process_without_images_gets_none(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    assert isinstance(batch_of(source(training_set, rank=0, processes=2), 1, 0), Batch)
    assert batch_of(source(training_set, rank=1, processes=2), 1, 0) is None


def test_regularisation_images_weigh_less(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 2)
    regularisation = replace(training_set.items[1], subset=replace(training_set.items[1].subset, is_reg=True))
    training_set = replace(training_set, items=(training_set.items[0], regularisation))
    weights = {}
    for _, _, batch in first(source(training_set, prior_loss_weight=0.25), 2):
        weights.update(zip(batch.item_keys, batch.loss_weights.tolist(), strict=True))
    assert weights == {"0:0:a.png": 1.0, "0:0:b.PNG": 0.25}


def test_subsets_weigh_what_they_say(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 2, loss_weight=0.5)
    regularisation = replace(training_set.items[1].subset, is_reg=True)
    training_set = changed(training_set, 1, subset=regularisation)
    weights = {}
    for _, _, batch in first(source(training_set, prior_loss_weight=0.25), 2):
        weights.update(zip(batch.item_keys, batch.loss_weights.tolist(), strict=True))
    assert weights == {"0:0:a.png": 0.5, "0:0:b.PNG": 0.125}


def test_batches_tell_sizes_attributes_and_the_strength_of_the_network(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 3)
    training_set = changed(training_set, 0, custom_attributes={"kind": "photo"})
    training_set = replace(training_set, datasets=(replace(training_set.datasets[0], network_multiplier=0.7),))
    for _, _, batch in first(source(training_set), 2):
        items = [item for key in batch.item_keys for item in training_set.items if item.key == key]
        assert batch.network_multiplier == 0.7
        assert batch.custom_attributes == tuple(item.custom_attributes for item in items)
        assert batch.original_wh.tolist() == [list(item.size_wh) for item in items]
        assert batch.original_wh.dtype == batch.crop_left_top.dtype == torch.int64
        assert batch.target_wh == items[0].bucket_wh
        assert batch.pixels.shape[2:] == batch.target_wh[::-1]


@pytest.mark.parametrize("cached", [False, True])
def test_the_told_crop_is_the_one_that_was_made(tmp_path: Path, cached: bool) -> None:
    training_set = make_training_set(tmp_path, 1, flip_aug=True, num_repeats=12)
    item = training_set.items[0]
    training_set = changed(training_set, 0, bucket_wh=(32, 48), crop_left_top=(10, 5))  # of 64x64
    whole = torch.from_numpy(normalized_pixels([load_picture(item).pixels]))[0]  # (3, 64, 64)
    live, seen = source(training_set), set()
    shown = cached_source(training_set) if cached else live
    for index in range(batches_per_epoch(training_set, processes=1)):
        batch, same = batch_of(shown, 1, index), batch_of(live, 1, index)
        for row, (left, top) in enumerate(batch.crop_left_top.tolist()):
            is_mirrored = left != 10
            picture = whole.flip(-1) if is_mirrored else whole
            assert torch.equal(same.pixels[row], picture[:, top : top + 48, left : left + 32])
            seen.add((left, top))
    assert seen == {(10, 5), (64 - 32 - 10, 5)}


def test_random_crops_are_told_as_they_were_made(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1, random_crop=True, num_repeats=12, batch_size=12)
    item = training_set.items[0]
    training_set = changed(training_set, 0, bucket_wh=(32, 48), crop_left_top=(16, 8))
    whole = torch.from_numpy(normalized_pixels([load_picture(item).pixels]))[0]
    batch = batch_of(source(training_set), 1, 0)
    crops = batch.crop_left_top.tolist()
    assert len({tuple(crop) for crop in crops}) > 6
    for row, (left, top) in enumerate(crops):
        assert torch.equal(batch.pixels[row], whole[:, top : top + 48, left : left + 32])


@pytest.mark.parametrize("on_disk", [None, True, False])
def test_masks_come_with_their_images(tmp_path: Path, on_disk: bool | None) -> None:
    """Live (None) and cached: on the latent grid, mirrored with the image, ones for images without."""
    training_set = masked(make_training_set(tmp_path / "images", 5, flip_aug=True), tmp_path / "masks", (0, 2))
    shown = source(training_set) if on_disk is None else cached_source(training_set, on_disk=on_disk)
    kinds = set()
    for epoch in range(1, 7):
        for index, entries in enumerate(OrderSource(training_set, seed=3, processes=1).epoch(epoch)):
            batch = batch_of(shown, epoch, index)
            kinds.add(expect_masks(batch, training_set, entries, epoch=epoch))
    assert kinds == {"masked", "mixed", "unmasked"}


def expect_masks(batch: Batch, training_set: TrainingSet, entries: tuple[Entry, ...], *, epoch: int) -> str:
    """Compares with the masks that live images have; tells what kind of batch it is."""
    expected = []
    for position, occurrence in entries:
        item = training_set.items[position]
        flipped = is_flipped(item, seed=3, epoch=epoch, occurrence=occurrence)
        expected.append(load_picture(item, flipped=flipped).mask)
    if all(mask is None for mask in expected):
        assert batch.mask is None
        return "unmasked"
    height, width = (side // 8 for side in batch.target_wh[::-1])
    assert batch.mask.shape == (len(entries), 1, height, width)
    assert batch.mask.dtype == torch.float32
    for row, mask in zip(batch.mask[:, 0], expected, strict=True):
        assert torch.equal(row, torch.ones(height, width) if mask is None else torch.from_numpy(mask))
    return "mixed" if any(mask is None for mask in expected) else "masked"


@pytest.mark.parametrize("on_disk", [True, False])
def test_cached_and_live_batches_agree_on_everything_but_pixels(tmp_path: Path, on_disk: bool) -> None:
    training_set = masked(make_training_set(tmp_path / "images", 5, flip_aug=True), tmp_path / "masks", (0, 1, 2))
    cached, live = cached_source(training_set, on_disk=on_disk), source(training_set)
    for (_, _, batch), (_, _, same) in zip(first(cached, 9), first(live, 9), strict=True):
        assert torch.equal(batch.latents, TinyVae()(same.pixels).to(torch.bfloat16))
        assert_same_batch(replace(batch, latents=None, text=None), replace(same, pixels=None))


@pytest.mark.parametrize("workers", [0, 4])
def test_warm_up_follows_the_steps_whatever_the_workers_and_the_start(tmp_path: Path, workers: int) -> None:
    training_set = make_training_set(tmp_path, token_warmup_step=0.5, token_warmup_min=1)  # 4 tags, 3 batches an epoch
    make = partial(source, training_set, clock=Clock(accumulation=2, total_steps=12))
    whole = first(make(), 12, workers=workers)
    counts = [{len(caption.split(", ")) for caption in batch.captions} for _, _, batch in whole]
    # two steps an epoch, of 2 batches and 1; W = 6 steps: tags = floor(step * 3 / 6) + 1
    assert counts == [{1}, {1}, {1}, {2}, {2}, {2}, {3}, {3}, {3}, {4}, {4}, {4}]
    assert_same(first(make(), 8, epoch=2, index=1, workers=workers), whole[4:])


def test_every_choice_of_a_showing_is_a_pure_function_of_when_it_is(tmp_path: Path) -> None:
    """Flip, crop, colours, dropout, caption and cached variant, asked for in any order and in threads."""
    training_set = make_training_set(tmp_path, 3, flip_aug=True, random_crop=True, color_aug=True, shuffle_caption=True,
                                     caption_dropout_rate=0.3, caption_tag_dropout_rate=0.2, token_warmup_step=20)  # fmt: skip
    items = [replace(item, bucket_wh=(32, 32), crop_left_top=(16, 16)) for item in training_set.items]
    showings = [(item, seed, epoch, epoch - 1) for item in items for seed in (1, 2) for epoch in range(1, 11)]

    def choices(showing: tuple[Item, int, int, int]) -> tuple:
        item, seed, epoch, occurrence = showing
        made = TrainingShowing(
            item=item, when=When(seed=seed, epoch=epoch, occurrence=occurrence), moment=Moment(epoch, 100)
        )  # fmt: skip
        return (made.is_flipped, made.placement, made.colours, made.is_caption_dropped, made.caption, made.variant(8))

    expected = [choices(showing) for showing in showings]
    assert [choices(showing) for showing in reversed(showings)] == expected[::-1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(choices, showings)) == expected
    assert all(len(set(map(str, one))) > 1 for one in zip(*expected, strict=True))  # each of them is drawn
    assert len(set(map(str, expected))) == len(expected)


@pytest.mark.parametrize("workers", [0, 3])
def test_an_image_that_vanishes_is_named(tmp_path: Path, workers: int) -> None:
    training_set = make_training_set(tmp_path)
    training_set.items[3].path.unlink()
    with pytest.raises(DatasetError, match=r"d\.png cannot be read: the file is not there"):
        first(source(training_set), 3, workers=workers)


def test_a_mistake_of_ours_names_the_image_too(tmp_path: Path) -> None:
    cached = cached_source(make_training_set(tmp_path, 1))
    cached.text_cache.conditioning_type = None
    with pytest.raises(RuntimeError, match=r"a\.png could not be made ready") as caught:
        batch_of(cached, 1, 0)
    assert caught.value.__cause__ is not None


def test_epochs_shorter_than_what_is_made_ahead(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1, flip_aug=True)
    assert_same(first(source(training_set), 30, workers=4), first(source(training_set), 30))


def test_a_set_with_nothing_to_train_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        source(replace(make_training_set(tmp_path, 1), items=()))


# validation


def with_validation(folder: Path, **subset_changes: Any) -> TrainingSet:
    """Three images that are trained and five (of two sizes) that validate, as the scan hands them on."""
    training_set = make_training_set(folder, 8, shuffle_caption=True, flip_aug=True, caption_dropout_rate=0.9, **subset_changes)
    fixed = without_chance(training_set.items[0].subset)
    validation = tuple(replace(item, subset=fixed) for item in training_set.items[3:])
    return replace(training_set, items=training_set.items[:3], validation=validation)


def validation(training_set: TrainingSet, **settings: Any) -> ValidationBatches:
    return ValidationBatches(training_set, **{"latent_cache": None, "text_cache": None, "seed": 3, **settings})


def test_validation_shows_each_image_once_as_it_is(tmp_path: Path) -> None:
    training_set = with_validation(tmp_path, loss_weight=0.3)
    by_key = {item.key: item for item in training_set.validation}
    batches = validation(training_set)
    seen = []
    for number in range(len(batches)):
        batch = batches.batch(number)
        seen += batch.item_keys
        assert batch.positions == tuple(range(batch.global_size))
        assert batch.loss_weights.tolist() == [1.0] * batch.global_size
        for row, key in enumerate(batch.item_keys):
            assert batch.captions[row] == caption_variant(by_key[key], 0) == by_key[key].caption
            expected = normalized_pixels([load_picture(by_key[key]).pixels])
            assert torch.equal(batch.pixels[row : row + 1], torch.from_numpy(expected))
    assert sorted(seen) == sorted(by_key)


def test_validation_from_caches_is_that_of_live_images(tmp_path: Path) -> None:
    training_set = with_validation(tmp_path)
    live, cached = validation(training_set), validation(training_set, **filled_caches(training_set))
    assert len(live) == len(cached) > 1
    for number in range(len(live)):
        batch, same = cached.batch(number), live.batch(number)
        assert torch.equal(batch.latents, TinyVae()(same.pixels).to(torch.bfloat16))
        assert_same_batch(replace(batch, latents=None, text=None), replace(same, pixels=None))
        assert torch.equal(batch.text.embeds, TinyTextEncoder()(list(batch.captions)).embeds)


def test_validation_is_the_same_with_wildcards_live_and_cached(tmp_path: Path) -> None:
    training_set = with_validation(tmp_path, enable_wildcard=True)
    items = tuple(replace(item, caption="{a|b|c|d|e} {1|2|3}\nother {x|y}") for item in training_set.validation)
    training_set = replace(training_set, validation=items)
    live, cached = validation(training_set), validation(training_set, **filled_caches(training_set))
    texts = [[batch.captions for batch in one.batches(workers=0)] for one in (live, live, cached)]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("workers", [0, 3])
def test_validation_batches_in_threads_and_shared_by_processes(tmp_path: Path, workers: int) -> None:
    batches = validation(with_validation(tmp_path))
    expected = [batches.batch(number).item_keys for number in range(len(batches))]
    with batches.batches(workers=workers) as made:
        assert [batch.item_keys for batch in made] == expected
    shares = [list(batches.batches(workers=workers, rank=rank, processes=2)) for rank in (0, 1)]
    assert [[batch.item_keys for batch in share] for share in shares] == [expected[0::2], expected[1::2]]


def test_validation_keeps_its_first_batches_under_a_limit(tmp_path: Path) -> None:
    training_set = with_validation(tmp_path)
    whole, part = validation(training_set), validation(training_set, limit=2)
    assert (len(whole), len(part)) == (3, 2)
    assert [part.batch(n).item_keys for n in range(2)] == [whole.batch(n).item_keys for n in range(2)]
    assert len(validation(training_set, limit=99)) == 3
    assert len(validation(make_training_set(tmp_path))) == 0


def test_validation_masks_and_strength(tmp_path: Path) -> None:
    training_set = with_validation(tmp_path / "images")
    draw(tmp_path / "mask.png", training_set.validation[0].size_wh, seed=9)
    items = (replace(training_set.validation[0], mask_path=tmp_path / "mask.png"), *training_set.validation[1:])
    dataset = replace(training_set.datasets[0], network_multiplier=0.5)
    training_set = replace(training_set, validation=items, datasets=(dataset,))
    for batches in (validation(training_set), validation(training_set, **filled_caches(training_set))):
        made = list(batches.batches(workers=0))
        assert {batch.network_multiplier for batch in made} == {0.5}
        (masks,) = [batch.mask for batch in made if batch.mask is not None]
        assert torch.equal(masks[masks.flatten(1).min(1).values < 1][0, 0], torch.from_numpy(load_picture(items[0]).mask))
