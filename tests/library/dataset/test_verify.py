"""Verifying files: each is read once, and never again while it stays as it is."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset import verify
from library.dataset.image_records import RECORDS_NAME, ImageRecord, ImageRecords
from library.dataset.verify import read_record, verify_images
from library.errors import DatasetError
from library.files.stamps import stamp


def picture(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    (image.convert("RGB") if mode == "P" else image).convert(mode).save(path, **options)
    return path


def verified(*paths: Path, records: ImageRecords | None = None, told: list[tuple[int, int]] | None = None):
    progress = None if told is None else (lambda done, total: told.append((done, total)))
    with ThreadPoolExecutor(2) as pool:
        records = ImageRecords() if records is None else records
        found = verify_images([str(path) for path in paths], records, lookers=pool, readers=pool, progress=progress)
    records.save()
    return {Path(path).name: result for path, result in found.items()}


def problem(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_record_of_a_file(tmp_path: Path):
    path = picture(tmp_path / "x.jpg")
    data = path.read_bytes()
    wanted = ImageRecord(*stamp(path.stat()), hashlib.sha256(data).digest(), (64, 48), False)
    assert read_record(path) == wanted


@pytest.mark.parametrize(
    ("name", "mode", "options", "has_alpha"),
    [
        ("a.png", "RGBA", {}, True),
        ("b.png", "LA", {}, True),
        ("c.png", "RGB", {}, False),
        ("d.png", "RGB", {"transparency": (1, 2, 3)}, True),
        ("e.png", "P", {"transparency": 0}, True),
        ("f.png", "P", {}, False),
        ("g.webp", "RGBA", {}, True),
        ("h.webp", "RGB", {}, False),
        ("i.jpg", "RGB", {}, False),
        ("j.bmp", "RGB", {}, False),
    ],
)
def test_alpha_channel(name: str, mode: str, options: dict, has_alpha: bool, tmp_path: Path):
    assert read_record(picture(tmp_path / name, mode=mode, **options)).has_alpha is has_alpha


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.97])
def test_files_cut_short_are_found(suffix: str, kept: float, tmp_path: Path):
    path = picture(tmp_path / f"x{suffix}", (200, 150))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "cannot be read" in problem(path)


@pytest.mark.parametrize("name", ["folder.png", "pipe.png", "gone.png", "broken.png", "itself.png", "parent.png", "empty.png"])
@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_what_is_no_image_file(name: str, tmp_path: Path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    (tmp_path / "parent.png").symlink_to(tmp_path)
    (tmp_path / "empty.png").touch()
    reasons = {"folder.png": "it is a folder", "pipe.png": "it is no file but a pipe", "gone.png": "the file is not there",
               "broken.png": "it is a link to a file that is not there", "itself.png": "it is a link that leads back to itself",
               "parent.png": "it is a folder", "empty.png": "the file is empty (0 bytes)"}  # fmt: skip
    assert reasons[name] in problem(tmp_path / name)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path):
    path = tmp_path / "x.png"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # takes no room on disk
    assert "is too large (3,221,225,472 bytes)" in problem(path)


def test_a_file_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = picture(tmp_path / "x.png")
    data = path.read_bytes()
    monkeypatch.setattr(Path, "read_bytes", lambda self: data + b"more")
    assert "it is being written to" in problem(path)


def test_every_file_is_read_once_and_progress_is_told(tmp_path: Path):
    paths = [picture(tmp_path / f"{number}.png") for number in range(20)]
    told: list[tuple[int, int]] = []
    found = verified(*paths, *paths, told=told)
    assert {name: record.size_wh for name, record in found.items()} == {path.name: (64, 48) for path in paths}
    assert told == [(number, 20) for number in range(1, 21)]


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [picture(tmp_path / f"{number}.png") for number in range(3)]
    first = verified(*paths)
    new = picture(tmp_path / "new.png", (32, 32))
    read: list[str] = []
    decode = verify._decode
    monkeypatch.setattr(verify, "_decode", lambda data: read.append("decoded") or decode(data))
    told: list[tuple[int, int]] = []
    second = verified(*paths, new, told=told)
    assert told == [(1, 1)] and read == ["decoded"]  # only images that must be read are counted
    assert second == {**first, "new.png": read_record(new)}
    assert verified(*paths, new, told=told) == second and told == [(1, 1)]


def test_a_file_with_another_time_and_the_same_bytes_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = picture(tmp_path / "x.png")
    verified(path)
    os.utime(path, ns=(10**18, 10**18))
    monkeypatch.setattr(verify, "_decode", lambda data: pytest.fail("decoded"))
    assert verified(path)["x.png"].mtime_ns == 10**18
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: pytest.fail("read") if self.suffix == ".png" else Path.open(self, "rb").read()
    )
    assert verified(path)["x.png"].mtime_ns == 10**18  # the new time has been remembered


def test_a_changed_file_is_read_again(tmp_path: Path):
    path = picture(tmp_path / "x.png", (64, 48))
    before = verified(path)["x.png"]
    picture(path, (48, 64))
    os.utime(path, ns=(before.mtime_ns, before.mtime_ns + 1))
    assert verified(path)["x.png"].size_wh == (48, 64)


def test_bad_files_are_not_remembered(tmp_path: Path):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:-200])
    found = verified(good, bad)
    assert "bad.png cannot be read" in found["bad.png"]
    assert ImageRecords().get(good) is not None and ImageRecords().get(bad) is None
    bad.write_bytes(good.read_bytes())
    assert verified(good, bad)["bad.png"].size_wh == (64, 48)


def test_a_long_check_is_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "SAVED_EVERY_S", -1.0)
    paths = [picture(tmp_path / f"{number}.png") for number in range(3)]
    seen: list[bool] = []
    with ThreadPoolExecutor(1) as pool:
        verify_images([str(path) for path in paths], ImageRecords(), lookers=pool, readers=pool,
                      progress=lambda done, total: seen.append((tmp_path / RECORDS_NAME).exists()))  # fmt: skip
    assert seen == [False, True, True]


def test_records_are_readable_like_any_file_beside_the_images(tmp_path: Path):
    verified(picture(tmp_path / "x.png"))
    assert stat.S_ISREG((tmp_path / RECORDS_NAME).stat().st_mode)
