from __future__ import annotations

from dataclasses import replace

from library.dataset.items import SubsetSettings
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
    from library.dataset.loader import BatchSource

    subset = shuffling(tmp_path, caption_dropout_rate=0.4, flip_aug=True)
    data = training_set([save_picture(make_item(tmp_path, name, TAGS, subset=subset)) for name in ("a.png", "b.png", "c.png")])
    source = BatchSource(data, seed=7)
    trained = {}
    for epoch in (1, 2, 3, 4):
        for number in range(2):
            batch = source.micro_batch(epoch, number)
            trained.update({(key, epoch): text for key, text in zip(batch.item_keys, batch.captions, strict=True)})
    showings = showings_of(data)
    told = {(item.key, one.epoch): one.text for item in data.items for one in showings.examples(item, 4)}
    assert told == trained
    assert "" in told.values()
    assert len(set(told.values())) > 3


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
    data = training_set([make_item(tmp_path, caption=TAGS, subset=subset)])
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
