"""The table of dataset keys: types, ranges, levels, near names."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from library.dataset import schema
from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.resizing import OPENCV_RESIZERS, PILLOW_RESIZERS
from library.options.dataset import INTERPOLATIONS

KEYS = {key.name: key for key in schema.KEYS}
SPECS = os.environ.get("SPECS_DIR")
OURS = {"is_validation", "loss_weight"}
ALLOWED_HERE_ONLY = {  # in subsets of a style for which the reference does not take the key
    "random_crop": schema.MASKED,
    "alpha_mask": schema.MASKED,
    "class_tokens": schema.MASKED,
    "conditioning_data_dir": schema.METADATA,
}
KINDS = {
    "int": schema.WHOLE, "float": schema.NUMBER, "float or int": schema.NUMBER, "bool": schema.SWITCH, "str": schema.TEXT,
    "table": schema.TABLE, "[float,float]": schema.NUMBER_RANGE, "int or [w,h]": schema.RESOLUTION,
}  # fmt: skip
LEVELS = {"general": schema.GENERAL, "datasets": schema.DATASETS, "subsets": schema.SUBSETS}
STYLES = {"dreambooth": schema.FOLDER, "finetune": schema.METADATA, "controlnet": schema.MASKED}


def reference_rows() -> list[dict]:
    return json.loads(Path(__file__).with_name("reference_keys.json").read_text(encoding="utf-8"))


def problem(name: str, value: object) -> str:
    with pytest.raises(ValueError) as caught:
        schema.read_value(KEYS[name], value)
    return str(caught.value)


def test_every_row_is_a_field_of_the_settings_with_the_same_default():
    subset = {field.name: field.default for field in fields(SubsetSettings)}
    dataset = {field.name: field.default for field in fields(DatasetSettings)}
    with_factory = {"custom_attributes": {}}
    for key in schema.subset_keys():
        assert key.name == "image_dir" or with_factory.get(key.name, subset[key.name]) == key.default
    for key in schema.dataset_keys():
        if key.name != "resolution":
            assert dataset[key.name] == key.default
    assert {key.name for key in schema.subset_keys()} == set(subset) - {"place", "tags_joined"}
    assert {key.name for key in schema.dataset_keys()} - {"resolution"} == set(dataset) - {
        "place", "resolution_wh", "subsets", "warnings"}  # fmt: skip


def test_keys_are_the_reference_s_and_ours():
    assert set(KEYS) == {row["key"] for row in reference_rows()} | OURS and len(KEYS) == len(schema.KEYS)


@pytest.mark.parametrize("row", reference_rows(), ids=lambda row: row["key"])
def test_type_default_levels_styles_and_flag_are_the_reference_s(row: dict):
    key = KEYS[row["key"]]
    assert (key.kind, key.default, key.flag) == (KINDS[row["type"]], row["default"], row["flag"])
    assert set(key.levels) == {LEVELS[level] for level in row["levels"]}
    of_reference = {STYLES[style] for style in row["styles"]}
    assert set(key.styles) == of_reference | ({ALLOWED_HERE_ONLY[key.name]} if key.name in ALLOWED_HERE_ONLY else set())


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
def test_the_committed_rows_are_the_facts():
    facts: dict[str, dict] = {}
    for fact in json.loads((Path(str(SPECS)) / "dataset_config.json").read_text(encoding="utf-8"))["keys"]:
        facts.setdefault(fact["key"], {**fact, "styles": []})["styles"] += fact["styles"]  # image_dir has a row for each style
    assert len(facts) == len(reference_rows())
    for row in reference_rows():
        fact = facts[row["key"]]
        assert (row["type"], row["default"], row["levels"]) == (fact["type"], fact["default"], fact["levels"])
        assert row["flag"] == fact.get("cli_fallback") and set(row["styles"]) == set(fact["styles"])


@pytest.mark.parametrize("key", schema.KEYS, ids=lambda key: key.name)
def test_every_key_explains_itself_with_an_example_that_is_valid(key: schema.Key):
    assert len(key.help) > 20 and key.help.endswith(".") and key.help[0] in "[ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert schema.read_value(key, key.example) != key.default


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
    assert schema.read_value(KEYS["network_multiplier"], 2) == 2.0


def test_ranges_and_choices():
    assert problem("batch_size", 0) == "batch_size is 0, but must be at least 1"
    assert problem("caption_dropout_rate", 1.5) == "caption_dropout_rate is 1.5, but must be from 0 to 1"
    assert problem("loss_weight", 0) == "loss_weight is 0, but must be above 0"
    assert problem("token_warmup_step", -1) == "token_warmup_step is -1, but must be at least 0"
    assert "lanczos, nearest" in problem("resize_interpolation", "sharp")
    assert "is empty" in problem("caption_separator", "")
    assert "is empty" in problem("caption_extension", ".")
    assert schema.read_value(KEYS["caption_separator"], ".") == "." and schema.read_value(KEYS["caption_separator"], " ") == " "


@pytest.mark.parametrize("name", ["network_multiplier", "loss_weight", "caption_tag_dropout_rate", "token_warmup_step"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_are_finite(name: str, value: float):
    assert "but must be a number" in problem(name, value)


@pytest.mark.parametrize("value", [[2, 4], [2.0, 4.0], (2.0, 4.0)])
def test_ranges_can_be_written_in_several_ways(value: object):
    assert schema.read_value(KEYS["face_crop_aug_range"], value) == (2.0, 4.0)


@pytest.mark.parametrize(
    "value",
    [2, [2], [1, 2, 3], [4, 2], [0, 1], [-1, 1], ["2", "4"], [True, 2], "2,4", "4,2", "2", "a,b", "1,inf", [1, float("inf")], {}],
)
def test_wrong_ranges(value: object):
    assert "must be two numbers above 0, [smallest, largest], such as [2.0, 4.0]" in problem("face_crop_aug_range", value)


@pytest.mark.parametrize("value", [16_384 + 64, [64, 100_000], 100_000, [16_384, 16_384]])
def test_a_resolution_that_no_image_could_be_brought_to(value: object):
    assert "a side can have at most 16384 px, the area at most 134,217,728 pixels" in problem("resolution", value)
    assert schema.read_value(KEYS["resolution"], [16_384, 8192]) == (16_384, 8192)


@pytest.mark.parametrize("name", ["image_dir", "metadata_file", "conditioning_data_dir"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_path_is_not_the_current_folder(name: str, value: str):
    assert problem(name, value).startswith(f"{name} is empty: name a ")


def test_attributes_are_plain_data_of_any_depth():
    class InlineTable(dict):
        """Like the one of the TOML reader."""

    value = InlineTable(a=1, b=InlineTable(c=["x", True, 0.5]))
    read = schema.read_value(KEYS["custom_attributes"], value)
    assert read == {"a": 1, "b": {"c": ["x", True, 0.5]}} and type(read) is dict
    assert type(read["b"]) is dict
    for wrong in ({"a": None}, {"a": object()}, {"a": [float("nan")]}, {1: "a"}):
        assert "must be a table of texts, numbers, true or false, lists and tables" in problem("custom_attributes", wrong)
    wrong_type = 'custom_attributes has diff_output_preservation = "yes", but it must be true or false'
    assert problem("custom_attributes", {"diff_output_preservation": "yes"}) == wrong_type


def test_long_values_are_cut_in_messages():
    assert len(problem("flip_aug", ["a long text"] * 1000)) < 200


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


def test_the_style_of_a_subset():
    assert schema.style_of({"image_dir": "x"}) == schema.FOLDER
    assert schema.style_of({"image_dir": "x", "metadata_file": None}) == schema.FOLDER
    assert schema.style_of({"image_dir": "x", "conditioning_data_dir": "y"}) == schema.MASKED
    assert schema.style_of({"image_dir": "x", "conditioning_data_dir": "y", "metadata_file": "z"}) == schema.METADATA
    (text,) = schema.style_problems({"is_reg": True, "flip_aug": True}, schema.MASKED, "my.toml, subset 1")
    assert text == "my.toml, subset 1: is_reg does nothing in a subset with a conditioning_data_dir: take one of the two out"


def test_null_counts_as_not_given():
    assert schema.read_table({"resolution": None}, schema.GENERAL, "my.json") == ({}, [])
