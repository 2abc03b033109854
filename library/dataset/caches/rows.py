"""Batches out of cache entries: the tensors of each entry are read straight into its row of the batch. Torch is imported late.

Entries of unlike lengths are padded: a tensor (L, ...) of each of B entries becomes one (B, longest L, ...), with zeros past the
end of the shorter ones.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from library.dataset.caches.cache_file import CacheEntry, DamagedCacheError, Pick, tensor_bytes
from library.dataset.caches.hot_tensors import HotTensors
from library.errors import DatasetError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OPEN_AT_ONCE = 16  # files of one batch: some systems allow a process no more than 256, and several threads make batches


class RowSource(NamedTuple):
    """Where one row of a batch comes from. ``key`` tells what of the file is picked; ``recipe``: see ``CacheEntry``."""

    path: str
    key: Hashable
    pick: Pick
    recipe: str | None = None


class Entry(Protocol):
    """One row's tensors, wherever they are."""

    @property
    def path(self) -> str: ...

    @property
    def layout(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of each tensor; it has at least one axis."""

    def read_into(self, name: str, place: memoryview) -> None:
        """Fills ``place`` with a tensor's bytes."""


class MemoryEntry:
    """Tensors that are in memory; ``path`` is for messages."""

    __slots__ = ("_tensors", "layout", "path")

    def __init__(self, path: str, tensors: Mapping[str, Tensor]):
        self.path, self._tensors = path, tensors
        self.layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read_into(self, name: str, place: memoryview) -> None:
        place[:] = tensor_bytes(self._tensors[name])


class Column:
    """The batch's ``tensor`` (B, longest L, ...) of one name. ``entries`` tells which entries have it, by their places in the
    batch, and ``lengths`` the L of each."""

    __slots__ = ("_bytes", "_step", "entries", "lengths", "tensor")

    def __init__(self, dtype: torch.dtype, shapes: Mapping[int, tuple[int, ...]]):
        import torch

        self.entries, self.lengths = list(shapes), [shape[0] for shape in shapes.values()]
        rest = next(iter(shapes.values()))[1:]
        self.tensor = torch.empty((len(shapes), max(self.lengths), *rest), dtype=dtype)
        self._step = math.prod(rest) * self.tensor.element_size()
        self._bytes = self.tensor.view(torch.uint8).numpy().reshape(len(shapes), max(self.lengths) * self._step)

    def place(self, entry: int) -> memoryview:
        """The bytes that an entry is to fill; what pads them is set to zero."""
        row = self.entries.index(entry)
        size = self.lengths[row] * self._step
        self._bytes[row, size:] = 0
        return self._bytes[row, :size].data

    def copy(self, entry: int) -> Tensor:
        """What an entry has filled."""
        row = self.entries.index(entry)
        return self.tensor[row, : self.lengths[row]].clone()


def stacked(entries: Sequence[Entry]) -> dict[str, Column]:
    """A column of each name, with a row of each entry that has it, in their order.

    Raises DatasetError where entries do not fit into one batch.
    """
    names = dict.fromkeys(name for entry in entries for name in entry.layout)
    columns = {name: _column(name, entries) for name in names}
    for number, entry in enumerate(entries):
        for name in entry.layout:
            entry.read_into(name, columns[name].place(number))
    return columns


def _column(name: str, entries: Sequence[Entry]) -> Column:
    layouts = {number: entry.layout[name] for number, entry in enumerate(entries) if name in entry.layout}
    first, (dtype, first_shape) = next(iter(layouts.items()))
    for number, (other_dtype, shape) in layouts.items():
        if other_dtype != dtype or shape[1:] != first_shape[1:]:
            raise DatasetError(
                f"the tensors {name} of {entries[first].path} ({dtype}, {list(first_shape)}) and {entries[number].path} "
                f"({other_dtype}, {list(shape)}) do not fit into one batch: start without --skip_cache_check, so that those are "
                "made again that other settings have made"
            )
    return Column(dtype, {number: shape for number, (_, shape) in layouts.items()})


def read_row(path: str | Path, pick: Pick, *, recipe: str | None = None) -> dict[str, Tensor]:
    """The picked tensors of one cache file in the dtype they were stored in, with their checksums compared.

    Raises DamagedCacheError, or another DatasetError when the file was removed or replaced since it was checked.
    """
    with CacheEntry(path, pick, recipe=recipe) as entry:
        return {name: column.tensor[0] for name, column in stacked([entry]).items()}


class RowReader:
    """Reads batches for training. What is asked for again and again is kept in memory while there is room. Safe in threads."""

    def __init__(self) -> None:
        self._hot = HotTensors()

    def load(self, sources: Sequence[RowSource]) -> dict[str, Column]:
        """As ``stacked``. A damaged file is deleted, so that the next start makes it again.

        Raises DatasetError that names the file and says so.
        """
        try:
            columns = self._read(sources)
        except DamagedCacheError as error:
            raise _deleted(error) from error
        for number, source in enumerate(sources):
            self._hot.offer(source.key, partial(_copies, columns, number))
        return columns

    def _read(self, sources: Sequence[RowSource]) -> dict[str, Column]:
        opened: list[CacheEntry] = []
        try:
            return stacked([self._entry(source, opened) for source in sources])
        finally:
            for entry in opened:
                entry.close()

    def _entry(self, source: RowSource, opened: list[CacheEntry]) -> Entry:
        kept = self._hot.find(source.key)
        if kept is not None:
            return MemoryEntry(source.path, kept)
        if len(opened) == OPEN_AT_ONCE:
            return MemoryEntry(source.path, read_row(source.path, source.pick, recipe=source.recipe))
        opened.append(CacheEntry(source.path, source.pick, recipe=source.recipe))
        return opened[-1]


def _copies(columns: Mapping[str, Column], entry: int) -> dict[str, Tensor]:
    return {name: column.copy(entry) for name, column in columns.items() if entry in column.entries}


def _deleted(error: DamagedCacheError) -> DatasetError:
    try:
        Path(error.path).unlink(missing_ok=True)
    except OSError:  # Windows, while another thread reads it; or a folder that cannot be written
        return DatasetError(f"{error}: delete it and start again, it will be made anew")
    return DatasetError(f"{error}. It has been deleted and will be made again at the next start")
