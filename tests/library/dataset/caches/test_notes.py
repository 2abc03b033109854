from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from library.dataset.caches import notes as cache_notes
from library.dataset.caches.cache_file import FORMAT
from library.dataset.caches.notes import SETTLED_NS, CacheNotes, stamp

NAME = "atelier.tiny-latents.json"


def noted(folder: Path, **marks: str) -> CacheNotes:
    notes = CacheNotes("tiny-latents")
    for name, mark in marks.items():
        (folder / name).touch()
        notes.note(str(folder / name), mark, changed_ns=time.time_ns() - 2 * SETTLED_NS)
    return notes


def test_marks_are_there_for_the_next_start(tmp_path: Path) -> None:
    notes = noted(tmp_path, a="1|2|3")
    assert CacheNotes("tiny-latents").mark(str(tmp_path / "a")) == ""  # nothing is written before save
    notes.save()
    later = CacheNotes("tiny-latents")
    assert later.mark(str(tmp_path / "a")) == "1|2|3"
    assert later.mark(str(tmp_path / "b")) == ""
    assert CacheNotes("other-latents").mark(str(tmp_path / "a")) == ""


def test_notes_of_several_processes_are_joined_and_names_that_are_gone_leave(tmp_path: Path) -> None:
    noted(tmp_path, a="1", gone="2").save()
    (tmp_path / "gone").unlink()
    noted(tmp_path, b="3").save()
    assert json.loads((tmp_path / NAME).read_text())["files"] == {"a": "1", "b": "3"}


def test_a_file_that_changed_a_moment_ago_is_not_noted(tmp_path: Path) -> None:
    notes = CacheNotes("tiny-latents")
    (tmp_path / "a").touch()
    notes.note(str(tmp_path / "a"), "1", changed_ns=(tmp_path / "a").stat().st_ctime_ns)
    notes.save()
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"format": "0", "files": {"a": "1"}}', b'{"format": "%s", "files": []}',
                                     b'{"format": "%s", "files": {"a": [1]}}', b"[" * 100_000])  # fmt: skip
def test_damaged_notes_are_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content.replace(b"%s", FORMAT.encode()))
    assert CacheNotes("tiny-latents").mark(str(tmp_path / "a")) == ""
    noted(tmp_path, a="1").save()
    assert CacheNotes("tiny-latents").mark(str(tmp_path / "a")) == "1"


def test_where_nothing_can_be_written_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = noted(tmp_path, a="1")

    def refuse(*_: object) -> None:
        raise cache_notes.OutputError("read-only")

    monkeypatch.setattr(cache_notes, "write_atomically", refuse)
    notes.save()
    assert not (tmp_path / NAME).exists()


def test_names_that_are_no_text_are_noted(tmp_path: Path) -> None:
    name = "caf\udce9"
    noted(tmp_path, **{name: "1"}).save()
    assert CacheNotes("tiny-latents").mark(str(tmp_path / name)) == "1"


def test_bytes_changed_under_the_old_size_and_time_have_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    before = path.stat()
    time.sleep(0.02)  # past the clock's step
    path.write_bytes(b"after!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    if os.name != "nt":
        assert stamp(path.stat()) != stamp(before)
