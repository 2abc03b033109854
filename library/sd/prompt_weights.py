"""How strongly parts of a text count: ``(more)``, ``[less]``, ``(as said:1.3)``. Needs no torch.

The notation is that of AUTOMATIC1111's web UI: round brackets multiply by 1.1, square ones divide by it, a number behind a colon
says it outright, brackets nest, and a backslash before a bracket makes it a character. What is never closed reaches to the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STRONGER = 1.1
WEAKER = 1 / STRONGER
# an escaped character; a weight with its bracket; a bracket; a lone backslash or colon; text
MARK = re.compile(r"\\(?P<escaped>[()\[\]\\])|:(?P<weight>[+-]?(\d+\.?\d*|\.\d+))\)|(?P<bracket>[()\[\]])|[\\:]|[^\\()\[\]:]+")


@dataclass(slots=True)
class _Part:
    text: str
    weight: float = 1.0


def parse_weights(text: str) -> list[tuple[str, float]]:
    """``a (red:1.3) [cat]`` -> ("a ", 1.0), ("red", 1.3), (" ", 1.0), ("cat", 1 / 1.1). Never empty; neighbours differ in weight.

    A closing bracket that nothing opened is a character, as is the colon of a weight outside of brackets. A backslash before
    anything but a bracket or another backslash is dropped.
    """
    parts: list[_Part] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket's text begins
    for mark in MARK.finditer(text):
        bracket = mark["bracket"]
        if mark["escaped"]:
            parts.append(_Part(mark["escaped"]))
        elif bracket in opened:
            opened[bracket].append(len(parts))
        elif mark["weight"] and opened["("]:
            _multiply(parts, opened["("].pop(), float(mark["weight"]))
        elif bracket == ")" and opened["("]:
            _multiply(parts, opened["("].pop(), STRONGER)
        elif bracket == "]" and opened["["]:
            _multiply(parts, opened["["].pop(), WEAKER)
        elif mark[0] != "\\":
            parts.append(_Part(mark[0]))
    for bracket, factor in (("(", STRONGER), ("[", WEAKER)):
        for start in opened[bracket]:
            _multiply(parts, start, factor)
    return _joined(parts)


def _multiply(parts: list[_Part], start: int, factor: float) -> None:
    for part in parts[start:]:
        part.weight *= factor


def _joined(parts: list[_Part]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for part in parts:
        if joined and joined[-1][1] == part.weight:
            joined[-1] = (joined[-1][0] + part.text, part.weight)
        else:
            joined.append((part.text, part.weight))
    return joined or [("", 1.0)]
