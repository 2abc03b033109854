"""JSON as people write it: a name that stands twice is a mistake, which Python's reader would hide."""

from __future__ import annotations

import json


class RepeatedNameError(ValueError):
    """A name stands twice in one object."""


def parse_json(text: str) -> object:
    """Raises json.JSONDecodeError for wrong syntax, RepeatedNameError where a name stands twice in one object (the first value
    would be lost without a word), and other ValueErrors or RecursionError for what no one writes by hand."""
    return json.loads(text, object_pairs_hook=_without_repetition)


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
