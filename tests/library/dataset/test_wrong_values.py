"""Every wrong type for every key at every level: one line that names file, table, key, what was found and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from library.dataset import schema
from tests.library.dataset.dataset_files import document, problems, write

WRONG = {
    schema.WHOLE.words: [True, 1.5, "1", [1], {"a": 1}],
    schema.NUMBER.words: [False, "0.5", [0.5], {"a": 0.5}],
    schema.SWITCH.words: [0, 1, 1.0, "true", [True], {"a": True}],
    schema.TEXT.words: [True, 1, 0.5, ["a"], {"a": "b"}],
    schema.TABLE.words: [True, 1, "a = 1", ["a"], [{"a": 1}]],
    schema.NUMBER_RANGE.words: [True, 2.0, "2 to 4", [2.0], [2.0, 3.0, 4.0], [4.0, 2.0], ["2", "4"], {"a": 1}],
    schema.RESOLUTION.words: [True, 0, -512, 512.5, "512x512", [], [512, 0], [1, 2, 3], ["a", "b"], {"width": 512}],
}
ONLY_JSON = [None, 0.5, "text"]  # a list of mixed types, which TOML does not have
CASES = [(key, level) for key in schema.KEYS for level in key.levels]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong_values")
    (folder / "images").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "images" / "x.png")
    return folder


def place_of(level: str, file_name: str) -> str:
    places = {schema.GENERAL: "[general]", schema.DATASETS: "[[datasets]] 1", schema.SUBSETS: "[[datasets]] 1, subset 1"}
    return f"{file_name}, {places[level]}"


def with_value(folder: Path, level: str, values: dict[str, object]) -> dict:
    part = {schema.GENERAL: "general", schema.DATASETS: "dataset", schema.SUBSETS: "subset"}[level]
    return document(folder / "images", **{part: values})


@pytest.mark.parametrize(("key", "level"), CASES, ids=[f"{key.name} in {level}" for key, level in CASES])
def test_one_line_for_one_wrong_value(key: schema.Key, level: str, folder: Path):
    for file_name, values in (("my.toml", WRONG[key.kind.words]), ("my.json", [*WRONG[key.kind.words], ONLY_JSON])):
        for value in values:
            path = write(folder, with_value(folder, level, {key.name: value}), file_name)
            shown = json.dumps(value)
            assert problems(dataset_config=path) == [
                f"{place_of(level, file_name)}: {key.name} is {shown}, but must be {key.kind.words}"
            ]


@pytest.mark.parametrize("level", schema.ALL_LEVELS)
@pytest.mark.parametrize("file_name", ["my.toml", "my.json"])
def test_all_wrong_values_of_a_table_are_listed(level: str, file_name: str, folder: Path):
    keys = [key for key in schema.KEYS if level in key.levels]
    wrong = {key.name: WRONG[key.kind.words][0] for key in keys}
    found = problems(dataset_config=write(folder, with_value(folder, level, wrong), file_name))
    assert found == [
        f"{place_of(level, file_name)}: {key.name} is {json.dumps(wrong[key.name])}, but must be {key.kind.words}"
        for key in sorted(keys, key=lambda key: [*with_value(folder, level, wrong)["general"], *wrong].index(key.name))
    ]


@pytest.mark.parametrize("key", schema.KEYS, ids=lambda key: key.name)
def test_a_misplaced_key_is_told_its_place(key: schema.Key, folder: Path):
    for level in set(schema.ALL_LEVELS) - set(key.levels):
        found = problems(dataset_config=write(folder, with_value(folder, level, {key.name: key.example})))
        assert found == [f"{place_of(level, 'my.toml')}: {key.name} belongs in {' or '.join(key.levels)}, not here"]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1979-05-27", "1979-05-27T07:32:00Z", "1e400"])
def test_values_that_only_toml_can_write(text: str, folder: Path):
    for key in ("network_multiplier", "custom_attributes", "caption_prefix"):
        value = f"{{ a = {text} }}" if key == "custom_attributes" else text
        lines = (
            f"[general]\nresolution = 512\n{key} = {value}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}/images'\n"
        )
        (found,) = problems(dataset_config=write(folder, lines))
        assert "my.toml, [general]: " in found and "but must be" in found or "my.toml, line 3: " in found
