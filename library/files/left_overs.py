"""Temporary files and folders of runs that were killed: found by their names, removed once nobody can be writing them."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from library.files.atomic import TEMPORARY_MARK

SECONDS_PER_DAY = 86_400
FRESH_S = 60  # a temporary file this young may belong to a process of another machine that shares the folder
PROCESS_NUMBER = re.compile(re.escape(TEMPORARY_MARK) + r"(\d+)(-[0-9a-f]+)?(\.\w+)?$")


def remove_left_overs(folders: Iterable[Path], pattern: str) -> int:
    """Removes what matches the glob ``pattern`` in ``folders`` and bears a process number; says how many.

    Only what belongs to processes that are gone from this machine, and what is older than a day.
    """
    removed = 0
    for folder in sorted(set(folders)):
        for path in folder.glob(pattern) if folder.is_dir() else ():
            if _is_left_over(path):
                _remove(path)
                removed += 1
    return removed


def _is_left_over(path: Path) -> bool:
    number = PROCESS_NUMBER.search(path.name)
    if number is None:
        return False
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return age_s > SECONDS_PER_DAY or (age_s > FRESH_S and not _is_running(int(number[1])))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # held open by another program, or not ours: it stays
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if os.name == "nt":
        return True  # there os.kill(pid, 0) would end it; such files go by their age
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
