"""Files and folders are complete or absent, and a failure says why."""

from __future__ import annotations

import errno
import os

import pytest

from library.errors import OutputError
from library.files.atomic import file_written_atomically, folder_written_atomically, write_atomically, write_text_atomically


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    final = tmp_path / "deep" / "file.txt"
    write_text_atomically(final, "old")
    write_text_atomically(final, "new é")
    assert final.read_text(encoding="utf-8") == "new é"
    assert [p.name for p in final.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    final = tmp_path / "file"
    write_text_atomically(final, "old")

    def fails(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="disk is full"):
        write_atomically(final, fails)
    assert final.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="could not write"):
        write_text_atomically(tmp_path / "file" / "below", "x")


def test_the_ending_is_kept_for_writers_that_look_at_it(tmp_path):
    with file_written_atomically(tmp_path / "a.b.ckpt", keep_ending=True) as path:
        assert path.name == f"a.b.tmp-{os.getpid()}.ckpt"
        path.write_bytes(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.b.ckpt"]


def test_a_folder_is_replaced_whole(tmp_path):
    final = tmp_path / "state"
    for content in ("one", "two"):
        with folder_written_atomically(final) as folder:
            (folder / content).write_text(content)
    assert [p.name for p in final.iterdir()] == ["two"]
    with pytest.raises(ValueError, match="stop"), folder_written_atomically(final) as folder:
        (folder / "three").write_text("three")
        raise ValueError("stop")
    assert [p.name for p in final.iterdir()] == ["two"] and [p.name for p in tmp_path.iterdir()] == ["state"]
