"""The table of a network's modules that the network argument ``verbose`` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEADINGS = ("module", "rank", "alpha", "learning rate", "parameters", "name in the file")
TOTALS = ("part", "modules", "learning rate", "parameters")
SHOWN = 3  # different learning rates in one sum
LEFT = ("module", "part", "name in the file")  # columns of words; numbers stand on the right


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One module. ``part`` is what it is summed up under; ``rates`` are one or, with LoRA+, those of lora_down and lora_up;
    ``pairs``: of how many parts, rank and alpha of each."""

    path: str
    part: str
    rank: int
    alpha: float
    rates: tuple[float, ...]
    parameters: int
    name: str
    pairs: int = 1


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Lines in aligned columns: one for each module, then one for each part, in the order met, and the sum."""
    modules = [(r.path, _rank(r), f"{r.alpha:g}", _rates(r.rates), f"{r.parameters:,}", r.name) for r in rows]
    return [*_aligned(HEADINGS, modules), "", *_aligned(TOTALS, _totals(rows))]


def _rank(row: Row) -> str:
    """``"16"``, ``"3 x 16"``"""
    return str(row.rank) if row.pairs == 1 else f"{row.pairs} x {row.rank}"


def _totals(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    parts = dict.fromkeys(row.part for row in rows)
    sums = [(part, [row for row in rows if row.part == part]) for part in parts]
    return [
        (part, f"{len(members):,}", _all_rates(members), f"{sum(row.parameters for row in members):,}")
        for part, members in (*sums, ("all", rows))
    ]


def _all_rates(rows: Sequence[Row]) -> str:
    """Those of each row; where blocks have rates of their own, only the lowest and the highest."""
    texts = dict.fromkeys(_rates(row.rates) for row in rows)
    if len(texts) <= SHOWN:
        return ", ".join(texts)
    rates = [rate for row in rows for rate in row.rates]
    return f"{min(rates):g} to {max(rates):g}"


def _rates(rates: Sequence[float]) -> str:
    """``"0.0001"``, ``"0.0001 / 0.0016"`` of lora_down and lora_up, ``"not trained"``."""
    return " / ".join(f"{rate:g}" for rate in rates) if any(rates) else "not trained"


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if heading in LEFT else cell.rjust(width)
            for heading, cell, width in zip(headings, row, widths, strict=True)
        ).rstrip()
        for row in (headings, *rows)
    ]
