"""What is remembered about images: it counts while they are unchanged, and its loss costs nothing but time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from library.dataset.caches.names import CacheNames
from library.dataset.image_records import (
    RECORDS_NAME,
    ImageRecord,
    ImageRecords,
    SourceHashes,
    folder_mark,
    records_path,
    sha256_of,
)
from library.errors import DatasetError
from library.files.stamps import stamp


def file(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def record_of(path: Path, **changes) -> ImageRecord:
    stat = path.stat()
    return ImageRecord(*stamp(stat), bytes.fromhex(sha256_of(path)), (64, 48), True)._replace(**changes)


def saved(path: Path, cache_dir: Path | None = None, **changes) -> ImageRecords:
    records = ImageRecords(cache_dir)
    records.put(path, record_of(path, **changes))
    records.save()
    return records


def refuse_to_hash(path: Path) -> str:
    raise AssertionError(f"{path} was read")


def test_a_record_comes_back(tmp_path: Path):
    path = file(tmp_path / "a b 赤.png")
    saved(path)
    found = ImageRecords()
    assert found.get(path) == record_of(path)
    assert found.get(str(path)) == record_of(path)
    assert (found.size_wh(path), found.sha256(path)) == ((64, 48), record_of(path).sha256)
    assert found.get(tmp_path / "other.png") is None
    with pytest.raises(KeyError, match="other.png"):
        found.size_wh(tmp_path / "other.png")


def test_the_file_is_json_and_compact(tmp_path: Path):
    paths = [file(tmp_path / f"image{number:05}.png", b"%d" % number) for number in range(50)]
    records = ImageRecords()
    for path in paths:
        records.put(path, record_of(path))
    records.save()
    text = (tmp_path / RECORDS_NAME).read_text("ascii")
    document = json.loads(text)
    record = record_of(paths[7])
    assert document["images"]["image00007.png"] == [*record[:3], record.sha256.hex(), 64, 48, 1]
    assert len(text) / 50 < 150


def test_equal_sizes_are_one_object(tmp_path: Path):
    paths = [file(tmp_path / name) for name in ("a.png", "b.png")]
    records = ImageRecords()
    first, second = (records.put(path, record_of(path, size_wh=(int("640"), 480))) for path in paths)
    records.save()
    loaded = ImageRecords()
    assert first.size_wh is second.size_wh
    assert loaded.size_wh(paths[0]) is loaded.size_wh(paths[1])


def test_under_a_cache_folder_each_image_folder_has_its_own_file(tmp_path: Path):
    cache_dir = tmp_path / "caches"
    first, second = (file(tmp_path / name / "x.png", name.encode()) for name in ("a", "b"))
    for path in (first, second):
        saved(path, cache_dir)
    records = ImageRecords(cache_dir)
    assert records.get(first) == record_of(first) != records.get(second)
    names = {records_path(path.parent, cache_dir).name for path in (first, second)}
    assert {path.name for path in cache_dir.iterdir()} == names and len(names) == 2
    assert not list(first.parent.glob("*.json"))
    assert Path(CacheNames(cache_dir).path(first, "kind")).name.startswith(folder_mark(first.parent))


def test_identity_of_an_unchanged_file_needs_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = file(tmp_path / "x.png")
    saved(path)
    wanted = SourceHashes().identity(path)
    monkeypatch.setattr("library.dataset.image_records.sha256_of", refuse_to_hash)
    assert ImageRecords().identity(path) == wanted


def test_identity_of_a_changed_or_unknown_file_is_that_of_its_bytes(tmp_path: Path):
    path = file(tmp_path / "x.png")
    records = saved(path)
    file(path, b"CONTENT")
    os.utime(path, ns=(1, 1))
    assert records.identity(path) == SourceHashes().identity(path)
    other = file(tmp_path / "y.png", b"other")
    assert records.identity(other) == SourceHashes().identity(other)
    path.unlink()
    with pytest.raises(DatasetError, match=r"x\.png: No such file.*was it moved or deleted"):
        records.identity(path)


def good_bytes(tmp_path: Path) -> bytes:
    saved(file(tmp_path / "x.png"))
    return (tmp_path / RECORDS_NAME).read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b",64,48,", b",65,48,"),  # still JSON, but not what was written
        lambda data: data.replace(b'"format":2', b'"format":1'),
        lambda data: b"\xff\xfe" + data,
        lambda data: b"[]",
        lambda data: b"[" * 100_000,
        lambda data: b'{"format":2,"crc32":"00000000"}',
    ],
)
def test_a_damaged_file_is_as_good_as_none_and_is_written_again(damage, tmp_path: Path):
    data = good_bytes(tmp_path)
    (tmp_path / RECORDS_NAME).write_bytes(damage(data))
    records = ImageRecords()
    assert records.get(tmp_path / "x.png") is None
    records.put(tmp_path / "x.png", record_of(tmp_path / "x.png"))
    records.save()
    assert (tmp_path / RECORDS_NAME).read_bytes() == data


def test_every_flipped_byte_is_noticed(tmp_path: Path):
    data = good_bytes(tmp_path)
    for place in range(len(data)):
        (tmp_path / RECORDS_NAME).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert ImageRecords().get(tmp_path / "x.png") is None


def test_a_records_file_that_is_a_folder(tmp_path: Path):
    (tmp_path / RECORDS_NAME).mkdir()
    path = file(tmp_path / "x.png")
    assert saved(path).get(path) == record_of(path)
    assert ImageRecords().get(path) is None


def test_names_of_files_that_are_gone_are_dropped_and_others_stay(tmp_path: Path):
    paths = [file(tmp_path / name, name.encode()) for name in ("a.png", "b.png", "c.png")]
    for path in paths:
        saved(path)
    paths[0].unlink()
    saved(paths[1], size_wh=(1, 2))
    assert set(json.loads((tmp_path / RECORDS_NAME).read_text())["images"]) == {"b.png", "c.png"}


def test_nothing_is_written_when_nothing_was_learned(tmp_path: Path):
    path = file(tmp_path / "x.png")
    saved(path)
    (tmp_path / RECORDS_NAME).write_bytes(before := (tmp_path / RECORDS_NAME).read_bytes())
    stamp = (tmp_path / RECORDS_NAME).stat().st_mtime_ns
    records = ImageRecords()
    records.get(path)
    records.save()
    assert (tmp_path / RECORDS_NAME).read_bytes() == before
    assert (tmp_path / RECORDS_NAME).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("reads", "writes"), [(True, False), (False, False)])
def test_a_process_that_must_not_write_does_not(reads: bool, writes: bool, tmp_path: Path):
    path = file(tmp_path / "x.png")
    saved(path)
    other = file(tmp_path / "y.png")
    records = ImageRecords(reads=reads, writes=writes)
    assert (records.get(path) is not None) == reads
    records.put(other, record_of(other))
    records.save()
    assert records.get(other) is not None
    assert ImageRecords().get(other) is None


def test_a_read_only_folder_is_left_alone(tmp_path: Path):
    folder = tmp_path / "pictures"
    path = file(folder / "x.png")
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode
    ):
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        records = saved(path)
        assert records.get(path) == record_of(path)
        assert not (folder / RECORDS_NAME).exists()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_no_error(small_disk: Path):
    path = file(small_disk / "x.png")
    records = ImageRecords()
    for number in range(2000):
        records.put(file(small_disk / f"{number}.png", b""), record_of(path))
    records.save()
    assert not (small_disk / RECORDS_NAME).exists()
    assert not list(small_disk.glob("*.tmp-*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_that_are_no_text(tmp_path: Path):
    path = file(tmp_path / os.fsdecode(b"caf\xe9.png"))
    saved(path)
    assert ImageRecords().get(path) == record_of(path)
