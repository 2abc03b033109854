"""JSON with names that stand twice."""

from __future__ import annotations

import json

import pytest

from library.files.json_text import RepeatedNameError, parse_json


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
