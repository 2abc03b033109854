"""Lists of transformer blocks as arguments write them: ``all``, ``none``, ``0-5,8``. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from library.errors import NetworkError

RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")

Indices = frozenset[int] | None  # None = all


def parse_block_indices(value: Any) -> Indices:
    """``all``, ``none``, or numbers from 0 on and ranges of them, both ends included, with commas between them."""
    text = str(value).strip().strip("[]").lower()
    if text == "all":
        return None
    if text in ("none", ""):
        return frozenset()
    found: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        match = RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no block: give all, none, or numbers and ranges with commas, such as 0-5,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part} ends before it begins: write {last}-{first}")
        found.update(range(first, last + 1))
    return frozenset(found)


def other_blocks(path: str, indices: Indices) -> tuple[str, ...]:
    """A regex for the modules of the blocks ``path.N`` that are not in ``indices``; none where all are."""
    if indices is None:
        return ()
    chosen = "".join(rf"(?!{index}\.)" for index in sorted(indices))
    return (rf"{path}\.{chosen}\d+\..*",)


def check_indices(name: str, indices: Indices, *, blocks: int) -> None:
    """Raises NetworkError for blocks that the model, which has ``blocks`` of them, has not."""
    past = [f"{first}-{last}" if first < last else str(first) for first, last in _ranges(indices or ()) if last >= blocks]
    if past:
        go, last = "goes" if len(past) == 1 else "go", blocks - 1
        raise NetworkError(
            f"--network_args: {name}: {', '.join(past)} {go} past the last block, {last}: give numbers from 0 to {last}"
        )


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last of each run of numbers without a gap."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
