"""Captions that are not trained as their writer probably thinks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from library.dataset.image_records import ImageRecords
from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.scan import scan


def picture(path: Path, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def warnings(folder: Path, *, skip_bad_images: bool = False, records: ImageRecords | None = None, **settings) -> list[str]:
    values = {"place": "here", "image_dir": folder, "caption_extension": ".txt"}
    dataset = DatasetSettings(place="set", resolution_wh=(64, 64), subsets=(SubsetSettings(**values | settings),))
    return list(scan((dataset,), skip_bad_images=skip_bad_images, records=records).warnings)


def test_unread_caption_files_are_pointed_out(tmp_path: Path):
    picture(tmp_path / "a.png", "cat")
    picture(tmp_path / "b.png")
    (warning,) = warnings(tmp_path, caption_extension=".caption")
    assert warning.startswith("here: none of the 2 images has a .caption caption file, and 1 .txt files beside them are NOT read")
    assert 'caption_extension = ".txt"' in warning


def test_missing_and_empty_captions_are_counted(tmp_path: Path):
    for name, caption in (("a", None), ("b", ""), ("c", "text")):
        picture(tmp_path / f"{name}.png", caption)
    missing, empty = warnings(tmp_path)
    assert "1 of 3 images have no .txt caption file (such as a.png)" in missing
    assert "1 caption files are empty (such as b.txt)" in empty
    assert not any("no .txt" in text for text in warnings(tmp_path, class_tokens="cat"))


def test_images_that_are_left_out_are_not_counted(tmp_path: Path):
    picture(tmp_path / "a.png", "text")
    for name, caption in (("b", None), ("c", ""), ("d", "{x|y}\nmore")):
        picture(tmp_path / f"{name}.png", caption).write_bytes(b"damaged")
    assert warnings(tmp_path, skip_bad_images=True) == []
    picture(tmp_path / "e.png")
    (warning,) = warnings(tmp_path, skip_bad_images=True)
    assert "1 of 2 images have no .txt caption file (such as e.png)" in warning


def test_further_lines_and_braces_without_wildcards(tmp_path: Path):
    for name, caption in (
        ("a", "one\ntwo"),
        ("b", "a {red|blue} cat"),
        ("c", "plain {} | {x}"),
        ("d", "one\n\n"),
        ("e", "1\n2\n3"),
    ):
        picture(tmp_path / f"{name}.png", caption)
    assert warnings(tmp_path) == [
        "here: 2 of 5 captions have more than one line (such as that of a.png), and only the first is used; 1 of 5 captions have "
        "alternatives {a|b} (such as that of b.png), which are trained as they stand, braces and all: set enable_wildcard = true "
        "to have one chosen at each showing"
    ]
    assert warnings(tmp_path, enable_wildcard=True) == []


@pytest.mark.parametrize("cache_info", [True, False])
def test_lines_of_metadata_and_of_info_files(cache_info: bool, tmp_path: Path):
    path = picture(tmp_path / "a.png")
    entries = {str(path): {"caption": "one\ntwo", "tags": "x"}}
    name = "metadata_cache.json" if cache_info else "m.json"
    (tmp_path / name).write_text(json.dumps(entries))
    settings = {"cache_info": True} if cache_info else {"metadata_file": tmp_path / name}
    (warning,) = warnings(tmp_path, **settings)
    assert "here: 1 of 1 captions have more than one line" in warning


def test_metadata_without_text(tmp_path: Path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "m.json").write_text(json.dumps({"a.png": {"caption": " "}, "b.png": {"tags": "x"}}))
    (warning,) = warnings(tmp_path, metadata_file=tmp_path / "m.json")
    assert warning == "here: 1 images have neither caption nor tags (such as a.png): they train with an empty caption"
