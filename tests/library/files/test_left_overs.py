"""Left-overs of killed runs are removed; what may still be written, and what is the user's, is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.files.left_overs import FRESH_S, remove_left_overs

OLD = time.time() - 2 * FRESH_S


@pytest.fixture(scope="module")
def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make(path: Path, *, folder: bool = False, age: float = OLD) -> Path:
    if folder:
        path.mkdir()
        (path / "half").write_bytes(b"x")
    else:
        path.write_bytes(b"x")
    os.utime(path, (age, age))
    return path


@pytest.mark.skipif(os.name == "nt", reason="Windows goes by age alone")
def test_what_a_dead_process_left_is_removed(tmp_path, dead):
    gone = [make(tmp_path / f"a.safetensors.tmp-{dead}"), make(tmp_path / f"a.tmp-{dead}.safetensors"),
            make(tmp_path / f"a-state.tmp-{dead}", folder=True), make(tmp_path / f"a.tmp-{dead}-0a1f.ckpt"),
            make(tmp_path / f"a.ckpt.tmp-{dead}-ffff")]  # fmt: skip
    assert remove_left_overs([tmp_path], "a*.tmp-*") == 5
    assert not any(path.exists() for path in gone)


def test_everything_else_stays(tmp_path, dead):
    stays = [
        make(tmp_path / f"a.safetensors.tmp-{os.getpid()}"),  # somebody is writing it
        make(tmp_path / f"a.safetensors.tmp-{dead}", age=time.time()),  # too young
        make(tmp_path / f"b.safetensors.tmp-{dead}"),  # another name
        make(tmp_path / "a.tmp-x"),  # no process number
        make(tmp_path / "a.safetensors"),
    ]
    assert remove_left_overs([tmp_path, tmp_path / "nowhere"], "a*.tmp-*") == 0
    assert all(path.exists() for path in stays)


@pytest.mark.skipif(os.name == "nt", reason="Windows goes by age alone")
def test_what_cannot_be_removed_ends_nothing(tmp_path, dead, monkeypatch):
    stays, goes = make(tmp_path / f"a.ckpt.tmp-{dead}"), make(tmp_path / f"b.ckpt.tmp-{dead}")
    unlink = Path.unlink

    def held(path, missing_ok=False):
        if path == stays:
            raise PermissionError("held by another program")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    remove_left_overs([tmp_path], "*.tmp-*")
    assert stays.exists() and not goes.exists()
