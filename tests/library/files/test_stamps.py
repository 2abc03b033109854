"""What differs once a file was changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from library.files.stamps import stamp


def test_size_and_times(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    os.utime(path, ns=(5, 7))
    stat = path.stat()
    assert stamp(stat) == (3, 7, stat.st_ctime_ns)


@pytest.mark.skipif(os.name == "nt", reason="there ctime is the time of creation")
def test_a_change_under_the_old_size_and_time_shows(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    os.utime(path, ns=(5, 7))
    before = stamp(path.stat())
    time.sleep(0.02)  # past the clock's step
    path.write_bytes(b"ABC")
    os.utime(path, ns=(5, 7))
    assert stamp(path.stat()) != before and stamp(path.stat())[:2] == before[:2]
