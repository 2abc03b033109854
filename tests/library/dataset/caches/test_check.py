from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from library.dataset.caches.cache_file import MISSING, VALID, Verdict
from library.dataset.caches.check import Asked, CacheCheck, Found, source_stamps
from library.dataset.caches.notes import NO_MARK, CacheNotes
from tests.library.dataset.caches.cache_parts import settle


class Watched:
    """A check of plain files, valid unless they say "bad" and are read whole; ``opened`` notes what had to be looked at."""

    def __init__(self, sources: tuple[str, ...] = (), key: str = "k", full_bytes: int | None = None):
        self.opened: dict[str, Found] = {}
        self.notes = CacheNotes("test")
        self.check: CacheCheck[Path, Verdict] = CacheCheck(
            self.notes, ask=lambda path: Asked(str(path), key, sources), open_file=self.open_file
        )
        if full_bytes is not None:
            self.check.full_bytes = full_bytes

    def open_file(self, path: Path, found: Found) -> Verdict:
        self.opened[path.name] = found
        return Verdict("damaged", "bad") if found.read_whole and path.read_bytes() == b"bad" else VALID

    def start(self, *paths: Path) -> list[Verdict]:
        found = self.check.judge(paths)
        self.notes.save()
        return found


@pytest.fixture(autouse=True)
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)


def files(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(b"good")
    return paths


def rewrite(path: Path, data: bytes) -> None:
    """Under the old time."""
    times = path.stat()
    time.sleep(0.02)  # past the clock's step
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_file_is_opened_once_and_then_known(tmp_path: Path) -> None:
    a, b = files(tmp_path, "a", "b")
    first = Watched()
    assert first.start(a, tmp_path / "absent", b) == [VALID, MISSING, VALID]
    assert all(found.read_whole for found in first.opened.values())
    second = Watched()
    assert second.start(a, b) == [VALID, VALID]
    assert second.opened == {}


@pytest.mark.skipif(os.name == "nt", reason="there ctime is the time of creation")
def test_a_change_that_keeps_size_and_time_is_found_however_large_the_cache_is(tmp_path: Path) -> None:
    a, b = files(tmp_path, "a", "b")
    Watched().start(a, b)
    rewrite(a, b"bad")
    third = Watched(full_bytes=0)
    assert third.start(a, b) == [Verdict("damaged", "bad"), VALID]
    assert list(third.opened) == ["a"]
    assert Watched(full_bytes=0).start(a) == [Verdict("damaged", "bad")]  # damage is not noted


def test_what_is_not_valid_is_not_noted(tmp_path: Path) -> None:
    (a,) = files(tmp_path, "a")
    a.write_bytes(b"bad")
    for _ in range(2):
        assert Watched().start(a) == [Verdict("damaged", "bad")]


@pytest.mark.skipif(os.name == "nt", reason="there ctime is the time of creation")
def test_where_a_sources_times_changed_the_file_is_opened_and_its_tensors_are_not_read_again(tmp_path: Path) -> None:
    a, image = files(tmp_path, "a", "image.png")
    Watched((str(image),)).start(a)
    rewrite(image, b"GOOD")
    watched = Watched((str(image),), full_bytes=0)
    watched.start(a)
    assert not watched.opened["a"].read_whole
    again = Watched((str(image),), full_bytes=0)
    again.start(a)
    assert again.opened == {}


def test_what_is_wanted_of_a_file_is_part_of_its_note(tmp_path: Path) -> None:
    (a,) = files(tmp_path, "a")
    Watched().start(a)
    other = Watched(key="other")
    other.start(a)
    assert list(other.opened) == ["a"]


def test_of_a_large_cache_a_share_is_read_and_a_part_of_it_no_less(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(400)]
    for path in paths:
        path.write_bytes(b"x" * 100)

    def read_whole(day: int, some: list[Path]) -> set[str]:
        watched = Watched(full_bytes=10_000)
        watched.check._day = day
        watched.check.judge(some)
        return {name for name, found in watched.opened.items() if found.read_whole}

    days = [read_whole(day, paths) for day in (1, 2)]
    assert all(60 <= len(day) <= 140 for day in days)  # a quarter
    assert len(days[0] & days[1]) < 60  # other ones each day
    assert read_whole(1, paths[::2]) >= days[0] & {path.name for path in paths[::2]}
    assert len(read_whole(1, paths[:100])) == 100  # not above the limit: all


def test_only_what_was_read_whole_is_noted(tmp_path: Path) -> None:
    paths = files(tmp_path, *map(str, range(40)))
    first = Watched(full_bytes=80)  # half of them
    first.start(*paths)
    whole = {name for name, found in first.opened.items() if found.read_whole}
    assert 0 < len(whole) < 40
    second = Watched(full_bytes=0)
    second.start(*paths)
    assert set(second.opened) == {path.name for path in paths} - whole


def test_what_was_just_written_is_known(tmp_path: Path) -> None:
    a, image = files(tmp_path, "a", "image.png")
    watched = Watched((str(image),))
    watched.check.note_written(Asked(str(a), "k", (str(image),)), source_stamps([str(image)]), written=a.stat())
    watched.notes.save()
    later = Watched((str(image),))
    assert later.start(a) == [VALID]
    assert later.opened == {}


@pytest.mark.parametrize("then", ["replaced", "gone"])
def test_what_another_run_put_in_its_place_is_not(then: str, tmp_path: Path) -> None:
    a, other = files(tmp_path, "a", "other")
    written = a.stat()
    os.utime(other, ns=(written.st_atime_ns, written.st_mtime_ns))
    other.replace(a) if then == "replaced" else a.unlink()
    watched = Watched()
    watched.check.note_written(Asked(str(a), "k"), (), written=written)
    watched.notes.save()
    assert CacheNotes("test").mark(str(a)) == NO_MARK


def test_thousands_of_files_come_out_in_order(tmp_path: Path) -> None:
    paths = files(tmp_path, *map(str, range(0, 3000, 3)))
    asked = [tmp_path / str(number) for number in range(3000)]
    found = Watched().start(*asked)
    assert [verdict == VALID for verdict in found] == [path in set(paths) for path in asked]
