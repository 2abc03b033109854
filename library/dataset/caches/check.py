"""Judging all cache files of a run at its start. Torch-free.

A file that was checked by an earlier start (see ``cache_notes``) and is as it was then costs a look at its size and times. Of the
others the header is read, and the tensors of those

- whose size or times are not what was noted;
- of which nothing is noted, up to ``FULL_CHECK_BYTES`` together. Of more than that a share of about this size is read, other
  files each day; what slips through is found when training reads it (see ``rows``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from library.dataset.caches.cache_file import MISSING, VALID, Verdict
from library.dataset.caches.notes import NO_MARK, CacheNotes, stamp
from library.randomness import SEED_BITS, derive_seed

FULL_CHECK_BYTES = 2 << 30  # about 4,000 latents of 1024x1024; one to two seconds from a warm disk on two cores
CHECKERS = 8  # threads that look at cache files; it is the disk or the network that they wait for
STATS_AT_ONCE, CHECKS_AT_ONCE = 512, 16  # files that a thread takes at a time
DAY_S = 86_400

E = TypeVar("E")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Asked:
    """A cache file of a run: ``key`` is a digest of all that is wanted of it, ``sources`` are the files that it is made from."""

    path: str
    key: str
    sources: tuple[str, ...] = ()


@dataclass(slots=True)
class Found:
    """A cache file that must be opened. ``read_whole``: its tensors are to be read, too; ``is_known``: the wanted tensors were
    checked before, or will be now."""

    path: str
    mark: str
    size: int
    changed_ns: int
    read_whole: bool
    is_known: bool


class CacheCheck(Generic[E, R]):
    """Judges cache files and notes those that are valid to their last byte.

    ``ask`` says what is wanted of an entry's file, ``open_file`` judges one that must be opened. Both are called in threads.
    Which of the files without notes are read whole depends on their names, their total size and the day: all processes choose
    the same, and a process that looks at a part of the files reads at least those that were chosen from all.
    """

    def __init__(self, notes: CacheNotes, *, ask: Callable[[E], Asked], open_file: Callable[[E, Found], R]):
        self.full_bytes = FULL_CHECK_BYTES
        self.notes = notes
        self._ask, self._open_file = ask, open_file
        self._day = int(time.time() // DAY_S)

    def judge(self, entries: Sequence[E]) -> list[Verdict | R]:
        """VALID or MISSING, or what ``open_file`` says of a file; in the order of the entries."""
        with ThreadPoolExecutor(CHECKERS) as pool:
            starts = range(0, len(entries), STATS_AT_ONCE)
            looks = pool.map(lambda start: [self._look(entry) for entry in entries[start : start + STATS_AT_ONCE]], starts)
            seen = [result for part in looks for result in part]
            unsure = [(place, result) for place, result in enumerate(seen) if isinstance(result, Found)]
            self._choose([found for _, found in unsure])
            parts = [unsure[start : start + CHECKS_AT_ONCE] for start in range(0, len(unsure), CHECKS_AT_ONCE)]
            verdicts: list[Verdict | R | None] = [None if isinstance(result, Found) else result for result in seen]
            opened = pool.map(lambda part: [self._open(entries[place], found) for place, found in part], parts)
            for (place, _), verdict in zip(unsure, (verdict for part in opened for verdict in part), strict=True):
                verdicts[place] = verdict
        return cast("list[Verdict | R]", verdicts)

    def note_written(self, asked: Asked, source_stamps: Sequence[str], *, written: os.stat_result) -> None:
        """Notes a file that was just written, from sources that had these stamps before they were read.

        ``written`` was taken before the file got its name, under which another run may have put its own since: that is not noted.
        """
        try:
            stat = os.stat(asked.path)  # noqa: PTH116  # a name, no Path: there are very many
        except OSError:
            return
        if _identity(stat) == _identity(written):
            self.notes.note(asked.path, _mark(stat, asked, source_stamps), changed_ns=stat.st_ctime_ns)

    def _look(self, entry: E) -> Verdict | Found:
        asked = self._ask(entry)
        try:
            stat = os.stat(asked.path)  # noqa: PTH116
        except OSError:
            return MISSING
        mark = _mark(stat, asked, source_stamps(asked.sources))
        noted = self.notes.mark(asked.path)
        if mark == noted:
            return VALID
        has_note = noted != NO_MARK
        parts = zip(mark.split("|"), f"{noted}||".split("|"), strict=False)
        changed, other_key, _ = (has_note and now != then for now, then in parts)
        is_known = has_note and (changed or not other_key)
        return Found(asked.path, mark, stat.st_size, stat.st_ctime_ns, read_whole=changed, is_known=is_known)

    def _choose(self, unsure: Sequence[Found]) -> None:
        unknown = [found for found in unsure if not found.is_known]
        share = self.full_bytes / max(sum(found.size for found in unknown), 1)
        for found in unknown:
            found.read_whole = share >= 1 or self._place(found.path) < share

    def _place(self, path: str) -> float:
        """Between 0 and 1, spread evenly over names and days."""
        return derive_seed("cache check", self._day, os.path.basename(path)) / (1 << SEED_BITS)  # noqa: PTH119

    def _open(self, entry: E, found: Found) -> R:
        verdict = self._open_file(entry, found)
        if verdict == VALID and (found.read_whole or found.is_known):
            self.notes.note(found.path, found.mark, changed_ns=found.changed_ns)
        return verdict


def source_stamps(paths: Sequence[str]) -> list[str]:
    """Of each file; empty where it cannot be read, which is told when it is opened."""
    return [_stamp_or_nothing(path) for path in paths]


def _stamp_or_nothing(path: str) -> str:
    try:
        return stamp(os.stat(path))  # noqa: PTH116
    except OSError:
        return ""


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    """What giving a file another name does not change, as it does the ctime."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _mark(stat: os.stat_result, asked: Asked, stamps: Sequence[str]) -> str:
    return f"{stamp(stat)}|{asked.key}|{' '.join(stamps)}"
