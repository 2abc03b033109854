from __future__ import annotations

import os
from dataclasses import replace

import pytest

from library.dataset.items import SubsetSettings
from library.dataset.page.facts import cut_away, find_duplicates, gather_facts, tags_of
from library.errors import DatasetError
from tests.library.dataset.page.page_parts import count_words, make_item, save_picture, showings_of, training_set, with_masks


def facts_of(data, **more):
    return gather_facts(data, showings_of(data), processes=1, count_tokens=count_words, **more)


def test_buckets_count_showings_batches_and_the_last_batch(tmp_path):
    items = [make_item(tmp_path, f"{n}.png", repeats=3) for n in range(3)]
    wide = make_item(tmp_path, "w.png", bucket_wh=(96, 32), size_wh=(96, 32), resized_wh=(96, 32), crop_left_top=(0, 0))
    data = training_set([*items, wide], [make_item(tmp_path, "v.png")])
    (dataset,) = facts_of(data).datasets
    square, broad = dataset.buckets
    assert (square.bucket_wh, len(square.items), square.showings, square.batches) == ((64, 64), 3, 9, 5)
    assert (square.last_batch, square.is_incomplete, len(square.validation)) == (1, True, 1)
    assert (broad.showings, broad.batches, broad.last_batch) == (1, 1, 1)
    assert (dataset.batches, dataset.incomplete, len(dataset.validation)) == (6, 2, 1)


def test_full_batches_are_not_incomplete(tmp_path):
    data = training_set([make_item(tmp_path, f"{n}.png") for n in range(4)])
    assert facts_of(data).datasets[0].incomplete == 0
    twice = gather_facts(data, showings_of(data), processes=4, count_tokens=count_words)
    assert twice.datasets[0].incomplete == 1  # 8 images in a batch of four processes


def test_lengths_and_cut_captions(tmp_path):
    texts = ["", "one two", "one two three four five six", "one two three four five six seven eight"]
    data = training_set([make_item(tmp_path, f"{n}.png", text) for n, text in enumerate(texts)])
    facts = facts_of(data)
    small, large = facts.encoders
    assert dict(small.lengths) == {0: 1, 2: 1, 6: 1, 8: 1}
    assert (small.longest, small.over, large.over) == (8, 1, 0)
    (cut,) = facts.cut
    assert cut.item.index == 3
    assert cut.lost == " seven eight"
    assert [use.encoder for use in cut.uses] == ["small"]


def test_lengths_are_those_of_whole_captions(tmp_path):
    """Whatever training drops of them now and then."""
    subset = SubsetSettings(
        place="here",
        image_dir=tmp_path,
        shuffle_caption=True,
        caption_dropout_rate=0.5,
        caption_tag_dropout_rate=0.9,
        token_warmup_step=100,
        caption_prefix="photo,",
    )
    data = training_set([make_item(tmp_path, f"{n}.png", "one,two,three,four,five,six", subset=subset) for n in range(5)])
    facts = facts_of(data)
    assert [dict(encoder.lengths) for encoder in facts.encoders] == [{7: 5}, {7: 5}]
    assert {cut.text for cut in facts.cut} == {"photo, one, two, three, four, five, six"}
    assert not facts.wildcards


def test_of_wildcards_one_version_is_counted(tmp_path):
    subset = SubsetSettings(place="here", image_dir=tmp_path, enable_wildcard=True, shuffle_caption=True)
    data = training_set([make_item(tmp_path, caption="a {red|dark blue} house\na tree", subset=subset)])
    facts = facts_of(data)
    assert facts.encoders[0].lengths.total() == 1
    assert facts.wildcards


def test_one_text_is_counted_once(tmp_path):
    asked = []

    def count(text):
        asked.append(text)
        return count_words(text)

    data = training_set([make_item(tmp_path, f"{n}.png") for n in range(5)])
    seen = []
    facts = gather_facts(data, showings_of(data), processes=1, count_tokens=count, progress=lambda *at: seen.append(at))
    assert asked == ["a house, a tree"]
    assert facts.encoders[0].lengths.total() == 5
    assert seen[-1] == (5, 5)


def test_enlarged_and_cropped_images_come_worst_first(tmp_path):
    small = make_item(tmp_path, "small.png", size_wh=(32, 32), resized_wh=(64, 64), crop_left_top=(0, 0))
    smaller = make_item(tmp_path, "smaller.png", size_wh=(16, 48), resized_wh=(64, 192), crop_left_top=(0, 64))
    exact = make_item(tmp_path, "exact.png", size_wh=(64, 64), resized_wh=(64, 64), crop_left_top=(0, 0))
    facts = facts_of(training_set([small, exact, smaller, make_item(tmp_path)]))
    assert [item.path.name for item in facts.enlarged] == ["smaller.png", "small.png"]
    assert [item.path.name for item in facts.cropped] == ["smaller.png", "a.png"]
    assert (smaller.scale, exact.scale) == (4.0, 1.0)
    assert cut_away(make_item(tmp_path)) == pytest.approx(1 / 3)


def test_empty_masks_are_those_that_let_nothing_count(tmp_path):
    data = with_masks(tmp_path)
    assert [item.path.name for item in facts_of(data).with_empty_mask] == ["black.png", "clear.png"]
    assert facts_of(replace(data, records=None)).with_empty_mask == ()  # a set that no scan has read


def test_empty_captions_and_class_tokens(tmp_path):
    named = SubsetSettings(place="here", image_dir=tmp_path, class_tokens="sks dog")
    prefixed = SubsetSettings(place="here", image_dir=tmp_path, caption_prefix="photo of")
    data = training_set(
        [
            make_item(tmp_path, "none.png", ""),
            make_item(tmp_path, "class.png", "sks dog", subset=named),
            make_item(tmp_path, "own.png", "a cat", subset=named),
            make_item(tmp_path, "prefix.png", "", subset=prefixed),
        ]
    )
    facts = facts_of(data)
    assert [item.path.name for item in facts.without_caption] == ["none.png"]
    assert [item.path.name for item in facts.with_class_tokens] == ["class.png"]


def test_tags_count_once_an_image(tmp_path):
    item = make_item(tmp_path, caption="tree, house, tree\nsky; x, ")
    assert tags_of(item) == ["tree", "house", "tree", "sky; x"]
    data = training_set([item, make_item(tmp_path, "b.png", "tree")], [make_item(tmp_path, "v.png", "secret")])
    assert facts_of(data).tags[0] == {"tree": 2, "house": 1, "sky; x": 1}


def test_tags_are_cut_where_training_cuts_them(tmp_path):
    subset = SubsetSettings(
        place="here", image_dir=tmp_path, caption_separator=";", keep_tokens_separator="|||", secondary_separator="+"
    )
    item = make_item(tmp_path, caption="who; what ||| a house, old; a tree+tall; ||| best", subset=subset)
    assert tags_of(item) == ["who", "what", "a house, old", "a tree+tall", "best"]


def test_duplicates_are_files_with_equal_bytes(tmp_path):
    original, copy = save_picture(make_item(tmp_path, "a.png")), make_item(tmp_path, "b.png", "another caption")
    copy.path.write_bytes(original.path.read_bytes())
    same_length = make_item(tmp_path, "c.png")
    data = bytearray(original.path.read_bytes())
    data[-1] ^= 1
    same_length.path.write_bytes(bytes(data))
    second_dataset = make_item(tmp_path, "a.png")
    held_out = make_item(tmp_path, "v.png")
    held_out.path.write_bytes(original.path.read_bytes())
    (group,) = find_duplicates(training_set([original, copy, same_length, second_dataset], [held_out]))
    assert [item.path.name for item in group.items] == ["a.png", "b.png", "v.png"]
    assert group.captions_differ
    assert find_duplicates(training_set([original, same_length, second_dataset])) == ()


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_is_a_duplicate(tmp_path):
    original, link = save_picture(make_item(tmp_path, "a.png")), make_item(tmp_path, "b.png")
    link.path.symlink_to(original.path)
    (group,) = find_duplicates(training_set([original, link]))
    assert not group.captions_differ


def test_a_file_that_vanished_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"a\.png"):
        find_duplicates(training_set([make_item(tmp_path)]))
