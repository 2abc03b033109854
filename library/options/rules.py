"""Checks that many option groups share. Each yields one sentence per problem: found, allowed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import fields

DEVICE = re.compile(r"(cpu|mps|(cuda|xpu|npu)(:\d+)?)")
ARGUMENT = re.compile(r"[A-Za-z_]\w*=.*[^,]")  # key=value; where a comma ends it, its value goes on


def quoted_together(argument: str, *, flag: str) -> str | None:
    """What is wrong with ``"a=1 b=2"`` as one word; None for one argument."""
    words = argument.split()
    if len(words) < 2 or not all(ARGUMENT.fullmatch(word) for word in words):
        return None
    return (
        f"{flag} {argument!r} is one word, in which {len(words)} arguments stand: write them as separate words, with blanks "
        f"between and no quotes around all, {flag} {' '.join(words)}; in a config file as separate texts of the list"
    )


def at_least(group: object, least: float, *names: str) -> Iterator[str]:
    """Options that are None, or a number not under ``least``."""
    for name in names:
        value = getattr(group, name)
        if value is not None and value < least:
            yield f"--{name} is {value}: give {least} or more"


def above_zero(group: object, *names: str) -> Iterator[str]:
    """Options that are None or a positive number."""
    for name in names:
        value = getattr(group, name)
        if value is not None and value <= 0:
            yield f"--{name} is {value}: give a number above 0"


def even(group: object, *names: str) -> Iterator[str]:
    """Options that are None or an even number above 0."""
    for name in names:
        value = getattr(group, name)
        if value is not None and (value <= 0 or value % 2):
            yield f"--{name} is {value}: give an even number above 0, for example 64"


def share(group: object, *names: str) -> Iterator[str]:
    """Options that are None or lie in 0..1."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not 0 <= value <= 1:
            yield f"--{name} is {value}: give a number from 0 to 1"


def device_name(group: object, *names: str) -> Iterator[str]:
    """Options that are None or a device as torch names it; whether it is there shows later."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not DEVICE.fullmatch(value):
            yield f"--{name} is {value!r}: give cpu, cuda, cuda:1 (the second GPU), mps or xpu"


def needs(group: object, name: str, needed: str) -> Iterator[str]:
    """An option that only works together with another one of the same group."""
    if getattr(group, name) and not getattr(group, needed):
        yield f"--{name} needs --{needed}: give it too, or drop --{name}"


def belongs_elsewhere(group: object, why: str, *, but: Collection[str] = ()) -> Iterator[str]:
    """Every option that is given, of a group that this architecture cannot use at all."""
    for option in fields(group):  # type: ignore[arg-type]
        value = getattr(group, option.name)
        if option.name not in but and value != option.default:
            shown = f"--{option.name}" if value is True else f"--{option.name}={value}"
            yield f"{shown} cannot be used: {why}; drop it"
