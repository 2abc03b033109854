"""JSON with names that stand twice, and the settings of models."""

from __future__ import annotations

import json

import pytest

from library.errors import CheckpointError
from library.files.json_text import RepeatedNameError, header_settings, model_settings, parse_json, read_model_settings


def test_json_is_read():
    assert parse_json('{"a": [1, {"b": null}], "c": {"b": 2.5}}') == {"a": [1, {"b": None}], "c": {"b": 2.5}}
    with pytest.raises(json.JSONDecodeError):
        parse_json("{")


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 3}', '[{"x": {"a": 1, "a": 1}}]'])
def test_a_name_that_stands_twice(text: str):
    with pytest.raises(RepeatedNameError, match="^a stands twice in one object: take one of the two out$"):
        parse_json(text)


def test_one_name_among_very_many():
    text = ", ".join(f'"{number}.png": 1' for number in (*range(50_000), 49_999))
    with pytest.raises(RepeatedNameError, match=r"^49999\.png stands twice"):
        parse_json(f"{{{text}}}")


def test_settings_of_a_model(tmp_path):
    file = tmp_path / "config.json"
    assert read_model_settings(file) == {}  # not there
    file.write_bytes(b'\xef\xbb\xbf{"heads": 8}')  # as some editors save it
    assert read_model_settings(file) == {"heads": 8}
    assert model_settings("[1]", "the config entry") == {}


@pytest.mark.parametrize("content", [b"{", b"", b'{"name": "\xff"}', b"[" * 100_000], ids=["cut off", "empty", "no text", "deep"])
def test_settings_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not readable as JSON \(.*\); mend or remove it$"):
        read_model_settings(file)


@pytest.mark.parametrize("entry", [{}, {"config": ""}, {"config": "a network of somebody's"}, {"config": "[1, 2]"}])
def test_what_another_program_left_in_a_header_is_no_setting(entry):
    assert header_settings(entry) == {}


def test_the_config_entry_of_a_header():
    assert header_settings({"config": '{"unet": {"heads": 2}}'}) == {"unet": {"heads": 2}}
