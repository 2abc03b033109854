"""Where image tokens stand: windows of a square table of positions, as the checkpoint has it or made for a resolution.

p side of a table in patches · h, w rows and columns of image tokens · D width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.nn.transfer import sent

MAX_PERIOD = 10000.0
BASE_SIDE = 16  # the positions of a picture of any resolution run from 0 to this, with scaled tables
MARGIN = 1.5  # side of a scaled table over that of the square picture it is made for, so that long buckets fit


class ScaledPositions:
    """A table for each square resolution of a training; a bucket takes that of the resolution with the nearest area.

    What fits none, as a long bucket or a larger sample picture, gets a table of its own. Tables are fp32, made once per device.
    """

    def __init__(self, square_sides: Sequence[int], width: int):
        """``square_sides``: of the resolutions' squares, in patches; the order and repetitions do not matter."""
        self.width = width
        self.areas = area_limits(sorted(set(square_sides)))
        self._tables: dict[tuple[int, torch.device], Tensor] = {}

    def square_side(self, rows: int, columns: int) -> int:
        """Of the square picture whose table pictures of ``rows`` x ``columns`` tokens take."""
        found = next((side for limit, side in self.areas if rows * columns <= limit), self.areas[-1][1])
        longer = max(rows, columns)
        return found if longer <= table_side(found) else longer

    def table(self, square_side: int, device: torch.device) -> Tensor:
        """(p * p, D) with p = ``table_side(square_side)``"""
        key = (square_side, device)
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():  # kept tables must serve training too
                self._tables[key] = scaled_table(square_side, self.width, device)
        return self._tables[key]


def area_limits(square_sides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(largest number of tokens, side) of each resolution: the middle between two areas; for the last, what its table holds."""
    middles = [(low**2 + high**2) // 2 for low, high in zip(square_sides, square_sides[1:], strict=False)]
    return tuple(zip((*middles, int((MARGIN * square_sides[-1]) ** 2)), square_sides, strict=True))


def table_side(square_side: int) -> int:
    return int(MARGIN * square_side)


def scaled_table(square_side: int, width: int, device: torch.device) -> Tensor:
    """(p * p, width) in fp32: in its middle the positions of a picture of ``square_side`` patches run from 0 to ``BASE_SIDE``."""
    side = table_side(square_side)
    step = BASE_SIDE / square_side
    first = -step * (side - square_side) / 2  # of the places before the middle
    places = torch.arange(side, dtype=torch.float64) * step + first
    waves = sent(sinusoids(places, width // 2).float(), device)  # (p, D/2)
    table = torch.cat((waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)), dim=-1)  # columns, then rows
    return table.flatten(0, 1)


def sinusoids(places: Tensor, width: int) -> Tensor:
    """places (p,) -> (p, width): a block of sines, then a block of cosines."""
    half = width // 2
    frequencies = MAX_PERIOD ** (-torch.arange(half, dtype=places.dtype) / half)
    angles = torch.outer(places, frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def centre_window(table: Tensor, rows: int, columns: int) -> Tensor:
    """table (p * p, D) -> (1, rows * columns, D)"""
    side = side_of(table)
    top, left = (side - rows) // 2, (side - columns) // 2
    return table.view(side, side, -1)[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)


def windows_at(table: Tensor, corners: Tensor, rows: int, columns: int) -> Tensor:
    """table (p * p, D), corners (B, 2) on its device: row and column where each window begins -> (B, rows * columns, D)"""
    down = corners[:, :1] + torch.arange(rows, device=table.device)  # (B, rows)
    across = corners[:, 1:] + torch.arange(columns, device=table.device)  # (B, columns)
    return table[(down[:, :, None] * side_of(table) + across[:, None]).flatten(1)]


def side_of(table: Tensor) -> int:
    return round(table.shape[0] ** 0.5)
