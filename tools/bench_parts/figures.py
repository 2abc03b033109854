"""One measured figure, the table of all, and measuring two things in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

HEADINGS = ("figure", "measured", "target", "", "how")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number with the limit it should keep; without a limit it is shown for information."""

    name: str
    value: float
    unit: str  # "x" for a ratio
    at_most: float | None = None
    at_least: float | None = None
    how: str = ""  # what was compared, and the spread

    @property
    def verdict(self) -> str:
        """``ok``, ``over`` (a limit that the value exceeds), ``under`` (one that it does not reach), or nothing."""
        if self.at_most is not None and self.value > self.at_most:
            return "over"
        if self.at_least is not None and self.value < self.at_least:
            return "under"
        return "" if self.at_most is None and self.at_least is None else "ok"

    @property
    def target(self) -> str:
        limits = (("<=", self.at_most), (">=", self.at_least))
        return ", ".join(f"{sign} {limit:g} {self.unit}" for sign, limit in limits if limit is not None)


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table, its columns aligned for reading as it is."""
    rows = [HEADINGS, *((f.name, f"{f.value:.3g} {f.unit}", f.target, f.verdict, f.how) for f in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two things measured in turn: ``first[i]`` and ``second[i]`` right after each other, so that a busy machine slows both."""

    first: list[float]
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.first, self.second, strict=True)]

    @property
    def ratio(self) -> float:
        """first / second: the median over the pairs."""
        return median(self.ratios)

    def described(self, first: str, second: str) -> str:
        """``ours 1.23 s, theirs 4.56 s; medians of 5 pairs, ratios 0.2 to 0.3, of the fastest 0.25``."""
        count = len(self.first)
        times = f"{first} {seconds(median(self.first))}, {second} {seconds(median(self.second))}"
        spread = f"{min(self.ratios):.3g} to {max(self.ratios):.3g}, of the fastest {min(self.first) / min(self.second):.3g}"
        return f"{times}; medians of {count} pairs, ratios {spread}" if count > 1 else f"{times}; one pair"


def alternate(first: Callable[[], float], second: Callable[[], float], *, repeats: int, warm_up: bool = True) -> Pairs:
    """Calls both ``repeats`` times in turn, changing who goes first; each returns its own measurement."""
    if warm_up:
        first(), second()
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            found[index].append((first, second)[index]())
    return Pairs(*found)


def stopwatch(work: Callable[[], object]) -> Callable[[], float]:
    """``work`` as a measurement: seconds of CPU of this process where torch uses one thread, else wall time.

    What one thread uses hardly depends on what else the machine does; several threads wait for each other, and on a busy
    machine that is most of what a clock shows.
    """
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def measured() -> float:
        start = clock()
        work()
        return clock() - start

    return measured


def seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
