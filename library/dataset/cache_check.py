"""Reading the tensors of cache files at a start, to find damage that the header does not show. Torch-free.

A cache up to ``FULL_CHECK_BYTES`` is read whole. Of a larger one a share of about that size is read, other files each day; what
slips through is found when training reads it (see ``load_cache_tensors``).
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import BinaryIO

from library.files.safetensors_file import SafetensorsHeader, TensorInfo
from library.randomness import SEED_BITS, derive_seed

FULL_CHECK_BYTES = 2 << 30  # about 4,000 latents of 1024x1024; one to two seconds from a warm disk on two cores
READ_BYTES = 1 << 20
DAY_S = 86_400
CHANGED_BYTES = "the bytes of its tensors are not those that were written"

Stamp = tuple[int, int]  # size in bytes and mtime_ns of a cache file


class TensorCheck:
    """Compares the checksums of tensors with those in the header. One file is read once, as long as it stays the same.

    Which files are looked at depends on their names, their total size and the day: all processes choose the same, and a process
    that looks at a part of the files looks at least at those that were chosen from all. Safe in threads after ``choose``.
    """

    def __init__(self, *, full_bytes: int = FULL_CHECK_BYTES):
        self.full_bytes = full_bytes
        self._day = int(time.time() // DAY_S)
        self._due: dict[Path, Stamp] = {}
        self._intact: dict[Path, Stamp] = {}

    def choose(self, paths: Sequence[Path], pool: Executor) -> None:
        """Decides which of ``paths`` the next calls of ``broken`` read; those that do not exist do not count."""
        stamps = {path: stamp for path, stamp in zip(paths, pool.map(_stamp, paths), strict=True) if stamp is not None}
        total = sum(size for size, _ in stamps.values())
        share = self.full_bytes / max(total, 1)
        self._due = {path: stamp for path, stamp in stamps.items() if share >= 1 or self._place(path) < share}

    def broken(self, header: SafetensorsHeader, names: Collection[str]) -> dict[str, str]:
        """{name: what is wrong} of those of the file's tensors ``names`` that are damaged. Empty for a file that is not due."""
        path = header.path
        due = self._due.get(path)
        if due is None or self._intact.get(path) == due:
            return {}
        found = broken_tensors(header, names)
        if not found:
            self._intact[path] = due
        return found

    def _place(self, path: Path) -> float:
        """Between 0 and 1, spread evenly over names and days."""
        return derive_seed("cache check", self._day, path.name) / (1 << SEED_BITS)


def broken_tensors(header: SafetensorsHeader, names: Collection[str]) -> dict[str, str]:
    """{name: what is wrong} of those of the file's tensors ``names`` whose bytes do not have the noted checksum."""
    try:
        noted = json.loads(header.metadata["crc32"])
        with header.path.open("rb", buffering=0) as file:
            return {name: CHANGED_BYTES for name in names if _crc32(file, header.tensors[name]) != noted[name]}
    except OSError as error:
        return dict.fromkeys(names, f"cannot be read ({error.strerror or error})")
    except (KeyError, TypeError, ValueError):
        return dict.fromkeys(names, "its description is broken")


def _crc32(file: BinaryIO, info: TensorInfo) -> int:
    file.seek(info.start)
    left, value = info.end - info.start, 0
    while left:
        part = file.read(min(left, READ_BYTES))
        if not part:
            return -1  # ended early
        value = zlib.crc32(part, value)
        left -= len(part)
    return value


def _stamp(path: Path) -> Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
