"""JSON as people write it: a name that stands twice is a mistake, which Python's reader would hide. And as models come with it:
an object of settings, beside their weights or in a header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import CheckpointError


class RepeatedNameError(ValueError):
    """A name stands twice in one object."""


def parse_json(text: str) -> object:
    """Raises json.JSONDecodeError for wrong syntax, RepeatedNameError where a name stands twice in one object (the first value
    would be lost without a word), and other ValueErrors or RecursionError for what no one writes by hand."""
    return json.loads(text, object_pairs_hook=_without_repetition)


def model_settings(text: str | bytes, where: str) -> dict[str, Any]:
    """Settings that come with a model; none where the JSON is no object. Raises CheckpointError that names ``where``."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # of wrong syntax, of bytes that are no text
        raise CheckpointError(f"{where} is not readable as JSON ({error}); mend or remove it") from error
    return found if isinstance(found, dict) else {}


def header_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The entry ``config`` of a safetensors header; none where it is missing, or something of another program's."""
    try:
        return model_settings(metadata.get("config", "{}"), "the config entry")
    except CheckpointError:
        return {}


def read_model_settings(path: Path) -> dict[str, Any]:
    """The same of a file; none where there is no such file. Raises CheckpointError, also where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return model_settings(text, str(path))


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise RepeatedNameError(
            f"{_first_repeated([name for name, _ in pairs])} stands twice in one object: take one of the two out"
        )
    return table


def _first_repeated(names: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
