from __future__ import annotations

from dataclasses import replace

from library.dataset.items import SubsetSettings
from library.dataset.page.facts import Duplicates, gather_facts
from library.dataset.page.text import caption_lines, fact_lines, visible
from tests.library.dataset.page.page_parts import count_words, make_item, showings_of, training_set, with_masks

LONG = "one two three four five six seven eight"


def told(data, **more):
    showings = showings_of(data)
    facts = gather_facts(data, showings, processes=1, count_tokens=count_words, **more)
    return list(fact_lines(facts, showings))


def captions(data, images=9, **how):
    return "\n".join(caption_lines(data, showings_of(data, **how), count_words, images=images))


def test_facts_of_a_plain_set_are_short(tmp_path):
    item = make_item(tmp_path, size_wh=(64, 64), resized_wh=(64, 64), crop_left_top=(0, 0), repeats=2)
    assert told(training_set([item])) == [
        "dataset 1 (my.toml, [[datasets]] 1): 64x64 px, 2 per batch",
        "  1 image, 2 with repeats",
        "  1 batch an epoch",
        "  1 bucket: 64x64 (2)",
        "2 steps an epoch, 4 epochs, 8 steps in all",
        "small: at most 4 tokens of 6",
        "large: at most 4 tokens of 1,000",
    ]


def test_facts_that_need_a_look(tmp_path):
    regular = SubsetSettings(place="here", image_dir=tmp_path, is_reg=True, class_tokens="dog")
    items = [
        make_item(tmp_path, "long.png", LONG, size_wh=(32, 48)),
        make_item(tmp_path, "empty.png", ""),
        make_item(tmp_path, "reg.png", "dog", subset=regular, mask_path=tmp_path / "mask.png"),
    ]
    data = training_set(items, [make_item(tmp_path, "v.png")], skipped=("x.png cannot be read",))
    text = "\n".join(told(data, duplicates=(Duplicates((data.items[0], data.validation[0]), True),)))
    for line in (
        "  2 images, 2 with repeats; 1 for regularisation, 1 with repeats; 1 for validation; 1 masked",
        "  2 batches an epoch, 1 of them not full",
        "small: at most 8 tokens of 6, 1 caption longer than that and cut\nlarge: at most 8 tokens of 1,000\n  cut: long.png",
        "enlarged: 1 image, at most 2.00x: long.png",
        "much cropped: 4 images, at most 33% of the area: long.png, empty.png, reg.png ...",
        "duplicates: 2 files in 1 group with the same bytes, such as long.png, v.png",
        "without a caption: 1 image: empty.png",
        "no caption of their own, the class tokens stand in: 1 image: reg.png",
        "left out (--skip_bad_images): 1 bad image or caption",
    ):
        assert line in text


def test_empty_masks_are_told(tmp_path):
    assert "empty masks, so that nothing counts: 2 images: black.png, clear.png" in told(with_masks(tmp_path))


def test_long_names_lose_their_middle(tmp_path):
    (line,) = [line for line in told(training_set([make_item(tmp_path, f"{'x' * 90}.png")])) if "much cropped" in line]
    assert line.endswith(f"{'x' * 20}...{'x' * 16}.png")


def test_captions_as_read_and_as_trained(tmp_path):
    subset = SubsetSettings(place="here", image_dir=tmp_path, caption_prefix="photo of")
    text = captions(training_set([make_item(tmp_path, subset=subset), make_item(tmp_path, "b.png", subset=subset)]), images=1)
    assert f"dataset 1, subset 1 ({tmp_path}): 1 of 2 captions" in text
    assert "b.png" not in text
    assert "as read:            a house, a tree" in text
    assert "epoch 1, showing 1: photo of a house, a tree" in text
    assert "[tokens: small 6 of 6, large 6 of 1,000]" in text


def test_a_file_name_takes_one_line_whatever_is_in_it(tmp_path):
    odd = replace(make_item(tmp_path), path=tmp_path / "two\nlines\x1b \udcff.png")
    assert f"{tmp_path}/two\\nlines\\x1b \\xff.png" in captions(training_set([odd])).splitlines()


def test_every_subset_and_validation_are_told_apart(tmp_path):
    regular = SubsetSettings(place="there", image_dir=tmp_path, is_reg=True)
    held_out = make_item(tmp_path, "v.png", "held out")
    second = make_item(tmp_path, "r.png", "regular", subset=regular, subset_index=1)
    text = captions(training_set([make_item(tmp_path), second], [held_out]), images=1)
    heads = [line.split(" (")[0] for line in text.splitlines() if line.startswith("dataset")]
    assert heads == ["dataset 1, subset 1", "dataset 1, subset 1, validation", "dataset 1, subset 2, regularisation"]


def test_what_is_cut_is_shown(tmp_path):
    text = captions(training_set([make_item(tmp_path, caption=LONG)]))
    assert "small does not see the last 12 of 39 characters:  seven eight" in text
    assert "large does not" not in text


def test_dropped_and_empty_captions_are_quotes(tmp_path):
    dropping = SubsetSettings(place="here", image_dir=tmp_path, caption_dropout_rate=1.0)
    text = captions(training_set([make_item(tmp_path, subset=dropping), make_item(tmp_path, "b.png", "")]))
    assert text.count("'' (dropped)") == 3
    assert "as read:            ''\n" in text


def test_lines_of_a_caption_stand_under_each_other(tmp_path):
    subset = SubsetSettings(place="here", image_dir=tmp_path, enable_wildcard=True)
    item = replace(make_item(tmp_path, subset=subset), caption="a cat\na dog")
    text = captions(training_set([item]))
    assert "as read:            a cat\n                      a dog\n" in text


def test_control_characters_cannot_change_the_terminal():
    assert visible("a\x1b[31mred\ttab\nline") == "a\\x1b[31mred\\x09tab\nline"
    assert visible("家 👩\u200d👧 صورة") == "家 👩\u200d👧 صورة"


def test_a_long_caption_is_printed_once(tmp_path):
    text = captions(training_set([make_item(tmp_path, "a.png", "dog " * 100), make_item(tmp_path, "b.png", "a cat")]))
    assert text.count("dog " * 90) == 1 and "epoch 1, showing 1: the same\n" in text
    assert "as read:            a cat\n  epoch 1, showing 1: a cat\n" in text


def test_one_step_is_called_one_step(tmp_path):
    data = training_set([make_item(tmp_path)])
    showings = replace(showings_of(data), steps_per_epoch=1, epochs=1, total_steps=1)
    facts = gather_facts(data, showings, processes=1, count_tokens=count_words)
    assert "1 step an epoch, 1 epoch, 1 step in all" in list(fact_lines(facts, showings))
