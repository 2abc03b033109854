"""Files and folders are complete or absent, and a failure says why."""

from __future__ import annotations

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from library.errors import OutputError
from library.files import atomic
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
        assert re.fullmatch(rf"a\.b\.tmp-{os.getpid()}-[0-9a-f]{{4}}\.ckpt", path.name)
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


@pytest.fixture
def held(monkeypatch):
    """``held(name, times)``: the next renames to ``name`` fail as on Windows while another program holds the file open."""
    left: dict[str, int] = {}
    replace = Path.replace

    def fails_first(path, target):
        if left.get(Path(target).name, 0) > 0:
            left[Path(target).name] -= 1
            raise PermissionError(errno.EACCES, "Permission denied")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails_first)
    return left.__setitem__


@pytest.mark.parametrize("held_name", ["final", "final.replaced"])
def test_on_windows_a_held_name_is_tried_again(tmp_path, monkeypatch, held, held_name):
    monkeypatch.setattr(atomic, "RENAME_WAITS_S", (0.001, 0.001))
    for content in ("one", "two"):
        held(held_name, 2)
        with folder_written_atomically(tmp_path / "final") as folder:
            (folder / content).write_text(content)
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["two"]
    held("file", 2)
    write_text_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path, held):
    final = tmp_path / "final"
    with folder_written_atomically(final) as folder:
        (folder / "one").write_text("one")
    held("final", 1)
    with pytest.raises(OutputError, match="no permission"), folder_written_atomically(final) as folder:
        (folder / "two").write_text("two")
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (final / "one").read_text() == "one"


def test_what_an_interrupted_run_set_aside_stays_until_there_is_a_new_one(tmp_path, held):
    replaced = tmp_path / "final.replaced"
    replaced.mkdir()
    (replaced / "one").write_text("one")
    held("final", 2)
    with pytest.raises(OutputError), folder_written_atomically(tmp_path / "final") as folder:
        (folder / "two").write_text("two")
    assert (replaced / "one").read_text() == "one"


def test_two_threads_may_write_one_file_at_once(tmp_path):
    final = tmp_path / "a.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_text_atomically(final, str(number) * 1000), [n % 10 for n in range(200)]))
    assert len(set(final.read_text())) == 1 and len(final.read_text()) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
