"""metadata_cache.json: written, read, and found out when it is stale."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from library.dataset.image_records import ImageRecords
from library.dataset.info_file import INFO_NAME
from library.dataset.items import DatasetSettings, SubsetSettings, TrainingSet
from library.dataset.scan import scan
from library.errors import DatasetError


def picture(path: Path, caption: str | None = "a cat", size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def start(folder: Path, *, records: ImageRecords | None = None, skip_bad_images: bool = False, **settings) -> TrainingSet:
    values = {"place": "my.toml, subset 1", "image_dir": folder, "caption_extension": ".txt", "cache_info": True}
    subset = SubsetSettings(**values | settings)
    dataset = DatasetSettings(place="my.toml, [[datasets]] 1", resolution_wh=(64, 64), subsets=(subset,))
    return scan((dataset,), records=records or ImageRecords(), skip_bad_images=skip_bad_images)


def problems(folder: Path, **settings) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        start(folder, **settings)
    return list(caught.value.problems)


def captions(data: TrainingSet) -> dict[str, str]:
    return {item.path.name: item.caption for item in data.items}


def write(folder: Path, document: object) -> None:
    (folder / INFO_NAME).write_text(json.dumps(document), encoding="utf-8")


def test_the_file_is_made_in_the_references_form(tmp_path: Path):
    first, second = picture(tmp_path / "a.png", "赤い cat"), picture(tmp_path / "b.jpg", None, (32, 64))
    start(tmp_path, class_tokens="dog")
    assert json.loads((tmp_path / INFO_NAME).read_text("utf-8")) == {
        str(first): {"caption": "赤い cat", "resolution": [64, 48]},
        str(second): {"caption": "dog", "resolution": [32, 64]},
    }


def test_without_cache_info_there_is_no_file(tmp_path: Path):
    picture(tmp_path / "a.png")
    write(tmp_path, {"a.png": {"caption": "not read"}})
    assert captions(start(tmp_path, cache_info=False)) == {"a.png": "a cat"}
    (tmp_path / INFO_NAME).unlink()
    start(tmp_path, cache_info=False)
    assert not (tmp_path / INFO_NAME).exists()


def test_the_file_stands_in_for_the_folder_and_its_captions(tmp_path: Path):
    picture(tmp_path / "a.png", None)
    write(tmp_path, {str(tmp_path / "a.png"): {"caption": "from the file\nsecond line", "resolution": [1, 1]}})
    first = start(tmp_path)
    assert captions(first) == {"a.png": "from the file"}
    assert first.items[0].size_wh == (64, 48)  # its own sizes are not believed
    (warning,) = first.warnings
    assert "1 of 1 captions have more than one line" in warning and first.items[0].key == "0:0:a.png"
    assert captions(start(tmp_path, enable_wildcard=True)) == {"a.png": "from the file\nsecond line"}


def test_a_second_start_gives_the_same_items(tmp_path: Path):
    for name in ("b.png", "a.png", "c.jpg"):
        picture(tmp_path / name)
    assert start(tmp_path) == start(tmp_path)


@pytest.mark.parametrize("key", ["/elsewhere/before/a.png", "C:\\pictures\\a.png", "a.png", "./x/a.png"])
def test_a_folder_that_was_moved(key: str, tmp_path: Path):
    path = picture(tmp_path / "a.png")
    write(tmp_path, {key: {"caption": "moved"}})
    assert [(item.path, item.caption) for item in start(tmp_path).items] == [(path, "moved")]


def test_an_image_of_another_folder(tmp_path: Path):
    other = picture(tmp_path / "other" / "a.png")
    picture(tmp_path / "here" / "b.png")
    write(tmp_path / "here", {str(other): {"caption": "other"}, str(tmp_path / "here" / "b.png"): {"caption": "here"}})
    assert captions(start(tmp_path / "here")) == {"a.png": "other", "b.png": "here"}


def test_listed_images_that_are_gone(tmp_path: Path):
    picture(tmp_path / "a.png")
    write(tmp_path, {name: {"caption": "x"} for name in ("a.png", "gone.png", "lost.png", "nul\0.png")})
    (text,) = problems(tmp_path, skip_bad_images=True)
    assert f"{tmp_path / INFO_NAME} lists 3 images that are gone (such as gone.png); delete the file" in text


def test_images_that_the_file_lacks(tmp_path: Path):
    for name in ("a.png", "new1.png", "new2.png"):
        picture(tmp_path / name)
    write(tmp_path, {"a.png": {"caption": "x"}})
    data = start(tmp_path)
    assert captions(data) == {"a.png": "x"}
    (warning,) = data.warnings
    assert "2 images of the folder (such as new1.png) are not in" in warning and "delete that file" in warning


def test_captions_that_are_newer(tmp_path: Path):
    picture(tmp_path / "a.png")
    start(tmp_path)
    assert start(tmp_path).warnings == ()
    stamp = (tmp_path / INFO_NAME).stat().st_mtime_ns + 10**9
    (tmp_path / "a.txt").write_text("edited")
    os.utime(tmp_path / "a.txt", ns=(stamp, stamp))
    data = start(tmp_path)
    assert captions(data) == {"a.png": "a cat"}
    assert "1 caption files (such as a.txt) are newer than" in data.warnings[0]


def test_captions_that_are_gone(tmp_path: Path):
    for name, caption in (("a", "a cat"), ("b", "a dog"), ("c", None)):
        picture(tmp_path / f"{name}.png", caption)
    start(tmp_path, class_tokens="class")
    (tmp_path / "b.txt").unlink()
    data = start(tmp_path, class_tokens="class")
    assert captions(data) == {"a.png": "a cat", "b.png": "a dog", "c.png": "class"}
    assert data.warnings == (
        f"my.toml, subset 1: the caption files of 1 images (such as b.png) are gone since {tmp_path / INFO_NAME} was written, "
        "whose captions are used: delete that file to have it made again, or switch cache_info off",
    )
    (tmp_path / "a.txt").unlink()  # no caption file is left: the info file stands for all of them
    assert start(tmp_path, class_tokens="class").warnings == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{broken", "line 1, column 2"),
        ('{"a.png": {"caption": "x"}, "a.png": {"caption": "y"}}', "a.png stands twice in one object"),
        ("[]", "must hold an object with an entry for each image"),
        ("{}", "must hold an object with an entry for each image"),
        ('{"a.png": 3}', "the entry of a.png must be an object with a text"),
        ('{"a.png": {"caption": null}}', "the entry of a.png must be an object with a text"),
        ('{"a.png": {"caption": "\\ud800"}}', "the entry of a.png must be an object with a text"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_broken_file_is_named(content: str, words: str, tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / INFO_NAME).write_text(content)
    (text,) = problems(tmp_path)
    assert str(tmp_path / INFO_NAME) in text and words in text and "delete the file, it will be made again" in text


def test_nothing_is_written_while_an_image_is_bad_or_by_other_processes(tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / "bad.png").touch()
    start(tmp_path, skip_bad_images=True)
    assert not (tmp_path / INFO_NAME).exists()
    (tmp_path / "bad.png").unlink()
    start(tmp_path, records=ImageRecords(writes=False))
    assert not (tmp_path / INFO_NAME).exists()
    start(tmp_path)
    assert (tmp_path / INFO_NAME).exists()


def test_two_readings_of_one_folder_are_not_mixed(tmp_path: Path):
    picture(tmp_path / "a.png", "one\ntwo")
    subsets = [SubsetSettings(place=f"subset {wild}", image_dir=tmp_path, caption_extension=".txt", cache_info=True,
                              enable_wildcard=wild) for wild in (False, True)]  # fmt: skip
    datasets = tuple(DatasetSettings(place="d", resolution_wh=(64, 64), subsets=(subset,)) for subset in subsets)
    (_, warning) = scan(datasets, records=ImageRecords()).warnings
    assert "is not written (cache_info): two subsets with this folder have different captions" in warning
    assert not (tmp_path / INFO_NAME).exists()


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture(tmp_path / "a.png")

    def full(final: Path, text: str) -> None:
        from library.errors import OutputError

        raise OutputError(f"could not write {final}: the disk is full")

    monkeypatch.setattr("library.dataset.info_file.write_text_atomically", full)
    assert start(tmp_path).warnings == (f"cache_info: could not write {tmp_path / INFO_NAME}: the disk is full",)
