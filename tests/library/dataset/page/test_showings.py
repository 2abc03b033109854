from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np

from library.dataset.augment import told_crop
from library.dataset.batch import normalized_pixels
from library.dataset.clock import Clock, Moments
from library.dataset.images import load_picture
from library.dataset.items import SubsetSettings
from library.dataset.order import OrderSource
from library.dataset.validation_split import without_chance
from tests.library.dataset.page.page_parts import make_item, save_picture, showings_of, training_set

TAGS = "one, two, three, four, five, six"


def shuffling(folder, **keys):
    return SubsetSettings(place="here", image_dir=folder, shuffle_caption=True, **keys)


def test_a_caption_that_never_changes_is_one_example(tmp_path):
    data = training_set([make_item(tmp_path)])
    (example,) = showings_of(data).examples(data.items[0])
    assert (example.text, example.epoch, example.dropped) == ("a house, a tree", 1, False)


def test_examples_are_what_the_loader_gives(tmp_path):
    """Captions, sides and crops, also while tags warm up; images with repeats come several times in an epoch."""
    from library.dataset.loader import BatchSource

    subset = shuffling(tmp_path, caption_dropout_rate=0.2, flip_aug=True, random_crop=True, token_warmup_step=6)
    items = [make_item(tmp_path, f"{n}.png", TAGS, subset=subset, repeats=1 + n % 2, is_bucketed=False) for n in range(4)]
    data = training_set([save_picture(item) for item in items])
    clock, orders = Clock(accumulation=2, total_steps=8), OrderSource(data, seed=7, processes=1)
    showings = replace(showings_of(data), moments=Moments(data, clock, seed=7, processes=1))
    told = {(item.index, one.occurrence): one for item in data.items for one in showings.examples(item, 4 * item.repeats)}
    with BatchSource(data, seed=7, clock=clock).batches(1, 0, workers=0) as batches:
        trained = [batch for _, _, batch in islice(batches, 12)]  # 4 epochs of 3 batches, 2 steps each
    entries = [entries for epoch in range(1, 5) for entries in orders.epoch(epoch)]
    seen = set()
    for batch, of_batch in zip(trained, entries, strict=True):
        for row, (position, occurrence) in enumerate(of_batch):
            showing = showings.showing(data.items[position], occurrence)
            assert told.pop((position, occurrence)).text == showing.caption == batch.captions[row]
            assert told_crop(showing.placement, flipped=showing.is_flipped) == tuple(batch.crop_left_top[row].tolist())
            shown = load_picture(showing.item, placement=showing.placement, flipped=showing.is_flipped)
            assert np.array_equal(normalized_pixels([shown.pixels])[0], batch.pixels[row].numpy())
            seen.add((len(showing.caption.split(", ")), showing.is_flipped, showing.placement.crop_left_top))
    assert told == {}
    lengths, sides, crops = (len(set(values)) for values in zip(*seen, strict=True))
    assert lengths > 3 and sides == 2 and crops > 8


def test_repeats_are_showings_of_one_epoch(tmp_path):
    data = training_set([make_item(tmp_path, caption=TAGS, subset=shuffling(tmp_path), repeats=2)])
    examples = showings_of(data).examples(data.items[0], 3)
    assert [(one.epoch, one.occurrence) for one in examples] == [(1, 0), (1, 1), (2, 2)]


def test_a_dropped_caption_is_told_from_an_empty_one(tmp_path):
    dropping = shuffling(tmp_path, caption_dropout_rate=1.0)
    data = training_set([make_item(tmp_path, caption=TAGS, subset=dropping), make_item(tmp_path, "b.png", "")])
    showings = showings_of(data)
    assert [(one.text, one.dropped) for one in showings.examples(data.items[0], 1)] == [("", True)]
    assert [(one.text, one.dropped) for one in showings.examples(data.items[1])] == [("", False)]


def test_cached_captions_come_from_their_variants(tmp_path):
    data = training_set([make_item(tmp_path, caption=TAGS, subset=shuffling(tmp_path))])
    texts = [one.text for one in showings_of(data, variants=2).examples(data.items[0], 8)]
    assert len(set(texts)) == 2
    assert all(len(set(texts[start : start + 2])) == 2 for start in (0, 2, 4, 6))


def test_the_warm_up_of_tags_is_shown_over_the_whole_run(tmp_path):
    subset = SubsetSettings(place="here", image_dir=tmp_path, token_warmup_min=1, token_warmup_step=6)
    data = training_set([make_item(tmp_path, f"{n}.png", TAGS, subset=subset) for n in range(4)])  # 2 steps an epoch
    examples = showings_of(data).examples(data.items[0])
    assert [one.epoch for one in examples] == [1, 2, 4]
    lengths = [len(one.text.split(", ")) for one in examples]
    assert lengths[0] == 1 < lengths[1] < lengths[2] == 6


def test_validation_images_leave_nothing_to_chance(tmp_path):
    subset = shuffling(tmp_path, caption_dropout_rate=1.0, flip_aug=True)
    held_out = make_item(tmp_path, "v.png", TAGS, subset=without_chance(subset))
    data = training_set([make_item(tmp_path, caption=TAGS, subset=subset)], [held_out])
    showings = showings_of(data)
    (example,) = showings.examples(data.validation[0])
    assert example.text == TAGS
    assert showings.is_validation(data.validation[0])
    assert not showings.showing(replace(data.validation[0])).is_flipped
