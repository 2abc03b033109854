"""What earlier starts found out about cache files, so that the next one asks only for their sizes and times.

One JSON file ``atelier.<kind>.json`` in each folder with cache files: ``{"format": ..., "files": {name: mark}}``. A mark says
which file it was (size, mtime, ctime), what was wanted of it, and which image it was made from; only files that passed the whole
check, with every byte read, or that were just written have one. As long as a file's mark comes out the same it is valid.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from library.dataset.caches.cache_file import FORMAT
from library.errors import OutputError
from library.files.atomic import write_atomically
from library.files.stamps import stamp as file_stamp

SETTLED_NS = 2_000_000_000  # file systems count time in steps of up to two seconds; a file may change twice within one
NO_MARK = ""


class CacheNotes:
    """The notes on cache files of one kind ("anima-latents"). Safe in threads."""

    def __init__(self, kind: str):
        self.file_name = f"atelier.{kind}.json"
        self._read: dict[str, dict[str, str]] = {}  # folder -> {file name: mark}, as it stands on disk
        self._new: dict[str, dict[str, tuple[str, int]]] = {}  # folder -> {file name: (mark, ctime_ns)}
        self._lock = threading.Lock()

    def mark(self, path: str) -> str:
        """What is noted about a file, ``NO_MARK`` where nothing is."""
        folder, name = os.path.split(path)
        marks = self._read.get(folder)
        if marks is None:
            with self._lock:
                marks = self._read.get(folder)
                if marks is None:
                    marks = self._read[folder] = _read_marks(Path(folder, self.file_name))
        mark = marks.get(name, NO_MARK)
        return mark if isinstance(mark, str) else NO_MARK

    def note(self, path: str, mark: str, *, changed_ns: int) -> None:
        """Remembers a file's mark until ``save``. ``changed_ns``: its ctime."""
        folder, name = os.path.split(path)
        with self._lock:
            self._new.setdefault(folder, {})[name] = (mark, changed_ns)

    def release(self) -> None:
        """Lets go of what was read. What is new waits for ``save``."""
        self._read = {}

    def save(self) -> None:
        """Adds what is new to the files on disk, without names that are gone. Where a folder cannot be written, or the file
        changed a moment ago, nothing is noted, and the next start checks again."""
        with self._lock:
            new, self._new = self._new, {}
        settled_ns = time.time_ns() - SETTLED_NS
        for folder, found in new.items():
            marks = {name: mark for name, (mark, changed_ns) in found.items() if changed_ns < settled_ns}
            if marks:
                with suppress(OSError, OutputError):
                    _add_marks(Path(folder, self.file_name), marks)
        self.release()


def stamp(stat: os.stat_result) -> str:
    """The size and times of a file, as marks hold them."""
    return ".".join(f"{number:x}" for number in file_stamp(stat))


def _add_marks(file: Path, marks: dict[str, str]) -> None:
    with os.scandir(file.parent) as entries:
        present = {entry.name for entry in entries}
    joined = {name: mark for name, mark in {**_read_marks(file), **marks}.items() if name in present}
    text = json.dumps({"format": FORMAT, "files": joined}, separators=(",", ":"))  # ASCII: names need not be valid text
    write_atomically(file, lambda out: out.write(text.encode("ascii")))


def _read_marks(file: Path) -> dict[str, str]:
    """Empty where the file is missing, damaged or of another format."""
    try:
        found = json.loads(file.read_bytes())
        marks = found["files"] if found["format"] == FORMAT else {}
        return marks if isinstance(marks, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
