"""The kinds of value that an option can have, and how each is read from the command line or a config file.

Both sources use the same readers: a config file may hold typed values (``network_dim = 8``) or the text that the
command line would take (``learning_rate = "1e-4"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.files.user_path import user_path


@dataclass(frozen=True, slots=True)
class Kind:
    """``read`` turns text or a TOML value into the option's value, or raises ValueError. ``words``: what is allowed."""

    words: str
    metavar: str
    read: Callable[[object], object]


class Unfit(ValueError):
    """A value that an option cannot take, with ``str(self)`` = what it must be, where more is known than the kind's words."""


def _read_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return int(value)


def _read_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    if isinstance(value, str) and "," in value:
        raise Unfit("one number")
    number = float(value)
    if not math.isfinite(number):
        raise Unfit("a finite number")
    return number


def _read_steps_or_share(value: object) -> int | float:
    """Steps as an int, or a share of the run as a float: 100 -> 100, "0.1" -> 0.1, "50%" -> 0.5."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return _read_number(value.strip()[:-1]) / 100
    try:
        return _read_whole(value)
    except ValueError:
        share = _read_number(value)
    if share >= 1:  # 1.5 could mean steps or a share: neither is guessed
        raise ValueError
    return share


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _read_path(value: object) -> Path:
    return Path(user_path(_read_text(value)))


def _read_resolution(value: object) -> str:
    """The flag's text, or what people write in TOML: 1024 and [832, 1216]."""
    if isinstance(value, list):
        return ",".join(str(_read_whole(side)) for side in value)
    return value if isinstance(value, str) else str(_read_whole(value))


def number_range(value: object) -> tuple[float, float]:
    """Two numbers above 0, the second not under the first: "2.0,4.0" or [2.0, 4.0] -> (2.0, 4.0). Raises ValueError."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise ValueError
    if not isinstance(value, str) and any(isinstance(part, str) for part in parts):
        raise ValueError
    low, high = (_read_number(part) for part in parts)
    if not 0 < low <= high:
        raise ValueError
    return low, high


def _read_number_range(value: object) -> str:
    """The flag's text; a list, as people write it in TOML, becomes one."""
    try:
        low, high = number_range(value)
    except Unfit as error:
        raise ValueError from error  # what it says is of one of the two
    return value if isinstance(value, str) else f"{low},{high}"


SWITCH = Kind("true or false", "", _read_switch)
WHOLE = Kind("a whole number", "N", _read_whole)
NUMBER = Kind("a number", "X", _read_number)
STEPS_OR_SHARE = Kind("a whole number of steps, or a share of the run such as 0.1 or 10%", "N|SHARE", _read_steps_or_share)
TEXT = Kind("a text", "TEXT", _read_text)
PATH = Kind("a path", "PATH", _read_path)
RESOLUTION = Kind("a size in pixels, N or WIDTH,HEIGHT", "N|W,H", _read_resolution)
NUMBER_RANGE = Kind("two numbers above 0, MIN,MAX, for example 2.0,4.0", "MIN,MAX", _read_number_range)

BY_TYPE: dict[frozenset[type], Kind] = {
    frozenset({bool}): SWITCH,
    frozenset({int}): WHOLE,
    frozenset({float}): NUMBER,
    frozenset({int, float}): STEPS_OR_SHARE,
    frozenset({str}): TEXT,
    frozenset({Path}): PATH,
}
