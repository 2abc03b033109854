"""Rotary positions of Lumina's tokens: a caption's token i is at (i, 0, 0), an image's at (n, row, column).

n caption tokens · N image tokens · K head width
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from library.lumina.layout import NextDitConfig
from library.nn.rope import pair_table
from library.nn.transfer import sent

KEPT = 16  # tables, one per caption length and bucket in use; one of 4096 tokens takes 1.5 MiB


class RotaryTables:
    """Makes each table once, of numbers that are on the device already; the least recently used one is dropped.

    A table is fp32 (n + N, K), for ``apply_rope_pairs``.
    """

    def __init__(self, config: NextDitConfig):
        self._config = config
        self._axes: dict[torch.device, list[Tensor]] = {}
        self._tables: OrderedDict[tuple[int, tuple[int, int], torch.device], Tensor] = OrderedDict()

    def of(self, length: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Of a caption of so many tokens and an image of ``grid`` = (rows, columns) of patches."""
        key = (length, grid, device)
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():  # kept tables must serve training too
                self._tables[key] = self._made(length, grid, device)
        self._tables.move_to_end(key)
        while len(self._tables) > KEPT:
            self._tables.popitem(last=False)
        return self._tables[key]

    def _made(self, length: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        rows, columns = grid
        caption_axis, row_axis, column_axis = self._positions(device, (length + 1, rows, columns))
        still = [axis[:1].expand(length, -1) for axis in (row_axis, column_axis)]
        caption = torch.cat((caption_axis[:length], *still), dim=-1)  # (n, K)
        image = torch.cat(
            (
                caption_axis[length].expand(rows, columns, -1),
                row_axis[:rows, None].expand(-1, columns, -1),
                column_axis[:columns].expand(rows, -1, -1),
            ),
            dim=-1,
        )
        return torch.cat((caption, image.flatten(0, 1)))

    def _positions(self, device: torch.device, needed: tuple[int, ...]) -> list[Tensor]:
        """(positions, channels) of each axis, made on the host in fp64 and sent once; more than are known only when needed."""
        axes = self._axes.get(device)
        if axes is None or any(len(axis) < count for axis, count in zip(axes, needed, strict=True)):
            sizes = zip(needed, self._config.axes_lens, self._config.axes_dims, strict=True)
            axes = [sent(axis_table(max(count, known), side, self._config.rope_theta), device) for count, known, side in sizes]
            self._axes[device] = axes
        return axes


def axis_table(positions: int, side: int, theta: float) -> Tensor:
    """(positions, side): position p turns pair i by p * theta^(-2i / side); cosine and sine of each pair beside each other."""
    frequencies = theta ** (-torch.arange(0, side, 2, dtype=torch.float64, device="cpu") / max(side, 1))
    return pair_table(torch.outer(torch.arange(positions, dtype=torch.float64, device="cpu"), frequencies))
