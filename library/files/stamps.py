"""Is a file still what it was? Told from its size and times, without reading it."""

from __future__ import annotations

import os

Stamp = tuple[int, int, int]  # size in bytes, mtime and ctime in ns


def stamp(stat: os.stat_result) -> Stamp:
    """What differs once a file was written to or replaced.

    The time of the last change (ctime) is part of it because programs cannot set it: other bytes of the same length show even
    under the old mtime, and so does another file under the old name. On Windows it is the time of creation, which says no more
    than the other two.
    """
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
