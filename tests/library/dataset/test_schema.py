"""The table of dataset keys: types, ranges, levels, near names."""

from __future__ import annotations

from dataclasses import fields

import pytest

from library.dataset import schema
from library.dataset.images import OPENCV_RESIZERS, PILLOW_RESIZERS
from library.dataset.items import DatasetSettings, SubsetSettings
from library.options.dataset import INTERPOLATIONS

KEYS = {key.name: key for key in schema.KEYS}


def problem(name: str, value: object) -> str:
    with pytest.raises(ValueError) as caught:
        schema.read_value(KEYS[name], value)
    return str(caught.value)


def test_every_row_is_a_field_of_the_settings_with_the_same_default():
    subset = {field.name: field.default for field in fields(SubsetSettings)}
    dataset = {field.name: field.default for field in fields(DatasetSettings)}
    for key in schema.subset_keys():
        assert key.name == "image_dir" or subset[key.name] == key.default
    for key in schema.dataset_keys():
        if key.name != "resolution":
            assert dataset[key.name] == key.default
    assert {key.name for key in schema.subset_keys()} == set(subset) - {"place", "tags_joined"}
    assert {key.name for key in schema.dataset_keys()} - {"resolution"} == set(dataset) - {
        "place", "resolution_wh", "subsets", "warnings"}  # fmt: skip


@pytest.mark.parametrize("value", [512, [512, 512], [512], "512", "512,512", " 512 , 512 "])
def test_resolution_can_be_written_in_several_ways(value: object):
    assert schema.read_value(KEYS["resolution"], value) == (512, 512)


@pytest.mark.parametrize("value", [0, -1, True, 512.0, [], [1, 2, 3], [512, "a"], "a,b", "512x512", [0, 5], None])
def test_wrong_resolutions(value: object):
    assert "must be a size in pixels" in problem("resolution", value)


def test_every_interpolation_can_be_drawn_and_the_flag_has_all_but_box():
    assert set(schema.INTERPOLATIONS) == {*OPENCV_RESIZERS, *PILLOW_RESIZERS}
    assert set(schema.INTERPOLATIONS) - set(INTERPOLATIONS) == {"box"}


def test_types_are_not_guessed():
    assert problem("num_repeats", True) == "num_repeats is true, but must be a whole number"
    assert problem("num_repeats", 1.5) == "num_repeats is 1.5, but must be a whole number"
    assert problem("flip_aug", 1) == "flip_aug is 1, but must be true or false"
    assert problem("caption_dropout_rate", "0.1") == 'caption_dropout_rate is "0.1", but must be a number'
    assert schema.read_value(KEYS["caption_dropout_rate"], 1) == 1.0


def test_ranges_and_choices():
    assert problem("batch_size", 0) == "batch_size is 0, but must be at least 1"
    assert problem("caption_dropout_rate", 1.5) == "caption_dropout_rate is 1.5, but must be from 0 to 1"
    assert "nan" in problem("caption_tag_dropout_rate", float("nan"))
    assert "lanczos, nearest" in problem("resize_interpolation", "sharp")
    assert "is empty" in problem("caption_separator", "")
    assert "is empty" in problem("caption_extension", ".")


def test_unknown_key_gets_the_nearest_one():
    _, problems = schema.read_table(
        {"num_repeatz": 1, "subset": []}, schema.DATASETS, "my.toml, [[datasets]] 2", also_known=["subsets"]
    )
    assert problems == [
        "my.toml, [[datasets]] 2: num_repeatz is not a key (did you mean num_repeats?)",
        "my.toml, [[datasets]] 2: subset is not a key (did you mean subsets?)",
    ]


def test_misplaced_key_is_told_its_place():
    _, problems = schema.read_table({"image_dir": "x"}, schema.GENERAL, "my.toml, [general]")
    assert problems == ["my.toml, [general]: image_dir belongs in [[datasets.subsets]], not here"]
    _, problems = schema.read_table({"batch_size": 1}, schema.SUBSETS, "my.toml, subset 1")
    assert problems == ["my.toml, subset 1: batch_size belongs in [general] or [[datasets]], not here"]


def test_null_counts_as_not_given():
    assert schema.read_table({"resolution": None}, schema.GENERAL, "my.json") == ({}, [])
