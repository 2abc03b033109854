"""Filling a cache: writer threads, the progress bar, and what is told to the user."""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.dataset.caches.share import Gather
from library.errors import OutputError

WRITERS = 4  # each file is flushed to disk on its own; a few at a time hide that wait
MAX_WAITING = 64  # files encoded but not yet written: bounds memory when the disk is slower than the encoder
MIB = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FillReport:
    """What one process did: entries written (or kept in memory), entries that were there already, seconds."""

    written: int
    reused: int
    seconds: float


class CacheWriter:
    """Writes files in threads while the next ones are encoded. Use with ``with``: leaving it waits for what was submitted,
    also after an error or Ctrl-C, so that nothing that has been encoded is lost.

    ``what`` names the cache in messages, ``total`` is the number of entries that this fill has to write, ``bytes_each`` about
    what one takes.
    """

    def __init__(self, what: str, *, total: int, bytes_each: float, on_written: Callable[[int], object]):
        self.written = 0
        self._what, self._total, self._bytes_each = what, total, bytes_each
        self._on_written = on_written
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="cache-writer")
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def submit(self, write: Callable[[], None], *, entries: int = 1) -> None:
        """Queues one file of ``entries`` entries. Raises the OutputError of an earlier one."""
        self._waiting.append((self._pool.submit(write), entries))
        while self._waiting and (self._waiting[0][0].done() or len(self._waiting) > MAX_WAITING):
            self._collect_one()

    def _collect_one(self) -> None:
        future, entries = self._waiting.popleft()
        try:
            future.result()
        except OutputError as error:
            raise self._explained(error) from error
        self.written += entries
        self._on_written(entries)

    def _explained(self, error: OutputError) -> OutputError:
        """With the way out; a full disk also with how much is done and how much room is missing."""
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)):
            return OutputError(f"{error} (--cache_dir puts the cache files elsewhere)")
        for future, entries in self._waiting:
            if future.exception() is None:  # waits for it
                self.written += entries
        left = self._total - self.written
        needed_mib = max(left * self._bytes_each / MIB, 0.1)
        return OutputError(
            f"{error}. {self.written:,} of {self._total:,} {self._what} are cached and stay valid; the other {left:,} need about "
            f"{needed_mib:,.1f} MiB (--cache_dir puts them on another disk)"
        )

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        while kind is None and self._waiting:
            self._collect_one()


def progress_bar(what: str, unit: str, *, total: int, shown: bool) -> Any:
    """``caching latents:  40%|████      | 400/1,000 images [8.40 images/s, 01:11 left]``"""
    from tqdm import tqdm

    form = f"{{l_bar}}{{bar}}| {{n:,}}/{{total:,}} {unit}s [{{rate_noinv_fmt}}, {{remaining}} left]"
    return tqdm(desc=what, unit=f" {unit}s", total=total, bar_format=form, disable=not shown or total == 0)


def report_stale(what: str, stale: Iterable[tuple[Path, str]]) -> None:
    """One line for each reason why entries are made again."""
    stale = list(stale)
    examples = {reason: path for path, reason in reversed(stale)}
    for reason, count in sorted(Counter(reason for _, reason in stale).items()):
        logger.info("%s cache: %s made again, %s (%s)", what, f"{count:,}", reason, _example(examples[reason], count))


def _example(path: Path, count: int) -> str:
    return str(path) if count == 1 else f"{path} and others"


def report_filled(what: str, report: FillReport, place: str, *, gather: Gather | None = None) -> None:
    """One log line; with ``gather`` it tells of all processes, which then call this together."""
    parts = [report] if gather is None else gather(report)
    written, reused = sum(part.written for part in parts), sum(part.reused for part in parts)
    seconds = max(part.seconds for part in parts)
    logger.info("%s", f"{what} cache: {written:,} made, {reused:,} reused in {seconds:.1f} s ({place})")
