"""The flags of kohya-ss/sd-scripts, of which each training script has a table ``reference_<script>.json`` here."""

from __future__ import annotations

import json
import os
from pathlib import Path

from library.options.config_file import ConfigFileOptions
from library.options.declare import Option, groups_of, options_of

SPECS = os.environ.get("SPECS_DIR")
READ_AS_TEXT = {"resolution", "face_crop_aug_range"}  # kinds of their own; the reference takes any text
TYPES = {"true or false": "switch", "a whole number": "int", "a number": "float", "a text": "str", "a path": "Path"}


def declared(option_set: type) -> dict[str, Option]:
    """Name -> option, with those of the config file."""
    groups = [ConfigFileOptions, *groups_of(option_set).values()]
    return {option.name: option for group in groups for option in options_of(group)}


def reference_rows(script: str) -> list[dict]:
    """name, type, default, list and choices of each of the reference's flags. ``script`` without .py."""
    return json.loads(Path(__file__).with_name(f"reference_{script}.json").read_text(encoding="utf-8"))


def facts(script: str) -> dict[str, dict]:
    """The same from the folder of facts, by name."""
    spec = json.loads((Path(str(SPECS)) / "cli" / f"{script}.json").read_text(encoding="utf-8"))
    return {option["dest"]: _row(option) for option in spec["options"]}


def is_as_in(option: Option, row: dict, **other_defaults: object) -> bool:
    """Whether type, default and choices are those of the reference's row; further choices may follow."""
    type_name = "str" if option.name in READ_AS_TEXT else TYPES.get(option.kind.words, "int_or_float")
    default = other_defaults.get(option.name, row["default"])
    choices = list(option.choices)[: len(row["choices"])] == row["choices"] and (bool(row["choices"]) or not option.choices)
    same_default = option.default == default and type(option.default) is type(default)
    return (type_name, option.is_list) == (row["type"], row["list"]) and choices and same_default


def _row(option: dict) -> dict:
    kind = "switch" if option["action"] == "store_true" else option.get("type")
    return {
        "name": option["dest"],
        "type": kind or "str",
        "default": option["default"],
        "list": option.get("nargs") == "*",
        "choices": [choice for choice in option.get("choices") or [] if choice is not None],
    }
