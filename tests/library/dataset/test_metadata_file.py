"""Metadata JSON and JSONL."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from library.dataset.folders import ALWAYS_READ
from library.dataset.items import SubsetSettings
from library.dataset.metadata_file import MetadataEntry, joined_caption, read_metadata
from library.errors import DatasetError


def subset(path: Path, *, image_dir: Path | None = None, **settings) -> SubsetSettings:
    return SubsetSettings(place="my.toml, subset 1", image_dir=image_dir, metadata_file=path, **settings)


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)
    return path


def read(settings: SubsetSettings) -> tuple[list[MetadataEntry], list[str]]:
    found = read_metadata(settings, ALWAYS_READ)
    return found.entries, found.problems


def broken(path: Path) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        read(subset(path))
    return list(caught.value.problems)


def test_json(tmp_path: Path):
    inside, outside = image(tmp_path / "images" / "赤.png"), image(tmp_path / "other" / "b.jpg")
    image(tmp_path / "images" / "bare.webp")
    path = write(tmp_path / "meta.json", {
        "赤.png": {"caption": "a cat", "tags": "red, big", "image_size": [1, 1]},
        str(outside): {"tags": "only tags"},
        "bare": {"caption": "written without extension"},
        "none.png": {},
    })  # fmt: skip
    entries, problems = read(subset(path, image_dir=tmp_path / "images"))
    assert problems == []
    assert [(entry.path, entry.caption) for entry in entries] == [
        (inside, "a cat,red, big"),
        (outside, "only tags"),
        (tmp_path / "images" / "bare.webp", "written without extension"),
        (tmp_path / "images" / "none.png", ""),
    ]


def test_jsonl_beside_its_images(tmp_path: Path):
    image(tmp_path / "a.png")
    path = write(tmp_path / "meta.jsonl", '{"image_path": "a.png", "caption": "cat"}\n\n')
    entries, _ = read(subset(path))
    assert [(entry.key, entry.path, entry.caption) for entry in entries] == [("a.png", tmp_path / "a.png", "cat")]


@pytest.mark.parametrize(
    ("caption", "tags", "settings", "expected"),
    [
        ("one\ntwo", "x, y", {"enable_wildcard": True}, "one,x, y\ntwo,x, y"),
        ("", "x, y", {"enable_wildcard": True}, "x, y"),
        ("one\ntwo", "x", {}, "one,x"),
        ("one", "", {}, "one"),
        ("one", "x", {"caption_separator": ";"}, "one;x"),
    ],
)
def test_caption_and_tags_are_joined(caption: str, tags: str, settings: dict, expected: str):
    assert joined_caption(caption, tags, subset(Path("m.json"), **settings)).text == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.json", '{"a": 1,,}', "m.json, line 1, column 9"),
        ("m.json", "[]", "must hold one object"),
        ("m.json", "{}", "names no images"),
        ("m.jsonl", '{"image_path": "a"}\n{broken', "m.jsonl, line 2, column 2"),
        ("m.jsonl", '{"caption": "a"}', 'm.jsonl, line 1: each line needs an object with "image_path"'),
        ("m.jsonl", '{"image_path": "a", "tags": "x", "tags": "y"}', "m.jsonl, line 1: tags stands twice in one object: take"),
        ("m.json", '{"a.png": {"caption": "x"}, "a.png": {"caption": "y"}}', "m.json: a.png stands twice in one object: take"),
        ("m.json", '{"image_path": "a", "caption": "b"}', "m.json looks like JSON lines (one object per line): name it m.jsonl"),
        ("m.json", '\n{"image_path": "a"}\n{"image_path": "b"}\n', "m.json looks like JSON lines (one object per line): name it"),
    ],
)
def test_broken_files(name: str, content: str, words: str, tmp_path: Path):
    with pytest.raises(DatasetError) as caught:
        read_metadata(subset(write(tmp_path / name, content)), ALWAYS_READ)
    assert words in str(caught.value)


def test_file_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "m.json").write_bytes(b'{"\xe9": {}}')
    with pytest.raises(DatasetError, match="m.json: byte 2 is not UTF-8"):
        read_metadata(subset(tmp_path / "m.json"), ALWAYS_READ)


def test_bad_entries_are_named(tmp_path: Path):
    path = write(tmp_path / "m.json", {"a.png": 5, "b.png": {"tags": ["x"]}, "c.png": {"caption": "fine"}})
    entries, problems = read(subset(path, image_dir=tmp_path))
    assert [entry.key for entry in entries] == ["c.png"]
    assert "m.json, a.png: the entry must be an object" in problems[0]
    assert 'm.json, b.png: "tags" must be a text' in problems[1]


def test_attributes_of_single_images(tmp_path: Path):
    path = write(
        tmp_path / "m.json", {"a.png": {"custom_attributes": {"diff_output_preservation": True, "x": [1, "y"]}}, "b.png": {}}
    )
    entries, problems = read(subset(path, image_dir=tmp_path))
    assert [entry.custom_attributes for entry in entries] == [{"diff_output_preservation": True, "x": [1, "y"]}, None]
    assert problems == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"custom_attributes": [1]}, '"custom_attributes" must be an object'),
        ({"custom_attributes": {"diff_output_preservation": "yes"}}, "must be true or false"),
        ({"caption": "\ud800"}, '"caption" has half a character'),
        ({"tags": "\udfff"}, '"tags" has half a character'),
        ({"caption": 0}, '"caption" must be a text'),
    ],
)
def test_wrong_entries(record: dict, words: str, tmp_path: Path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"a.png": record}))
    entries, (problem,) = read(subset(path, image_dir=tmp_path))
    assert entries == [] and f"{path}, a.png: " in problem and words in problem


def test_what_other_tools_note_is_left_alone(tmp_path: Path):
    image(tmp_path / "a.png")
    record = {
        "caption": "c",
        "tags": None,
        "image_size": [1, 2],
        "train_resolution": [512, 512],
        "rating": "g",
        "latents": {"x": 1},
    }
    path = write(tmp_path / "m.json", {"a.png": record})
    entries, problems = read(subset(path, image_dir=tmp_path))
    assert [entry.caption for entry in entries] == ["c"] and problems == []


def test_several_entries_for_one_image_stay_in_their_order(tmp_path: Path):
    path = write(tmp_path / "m.jsonl", '{"image_path": "a.png", "caption": "1"}\n{"image_path": "a.png", "caption": "2"}')
    entries, _ = read(subset(path, image_dir=tmp_path))
    assert [entry.caption for entry in entries] == ["1", "2"]


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_thousands_of_brackets(name: str, tmp_path: Path):
    with pytest.raises(DatasetError, match="cannot be read"):
        read_metadata(subset(write(tmp_path / name, "[" * 100_000)), ALWAYS_READ)


def test_all_faulty_lines_are_told_together(tmp_path: Path):
    lines = ['{"image_path": "a.png"}', "{broken", "", "[]", '{"image_path": 3}', '{"image_path": "b.png"}']
    path = write(tmp_path / "m.jsonl", "\n".join(lines))
    found = broken(path)
    assert [text.partition(" ")[0] + text.partition(" ")[2][:6] for text in found] == [f"{path},line {n}" for n in (2, 4, 5)]
    path = write(tmp_path / "m.jsonl", "[]\n" * 1025)
    found = broken(path)
    assert len(found) == 21 and found[-1] == f"and 1,005 more lines of {path}"


def test_one_image_has_one_path(tmp_path: Path):
    here = image(tmp_path / "images" / "x.png")
    (tmp_path / "images" / "a").mkdir()
    names = ["x.png", "./x.png", "a/../x.png", "../images/x.png", str(tmp_path / "images" / "a" / ".." / "x.png"), "a/../x"]
    path = write(tmp_path / "m.jsonl", "\n".join(json.dumps({"image_path": name}) for name in names))
    entries, _ = read(subset(path, image_dir=tmp_path / "images"))
    assert [str(entry.path) for entry in entries] == [str(here)] * len(names)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_behind_a_linked_folder_the_way_back_is_another(tmp_path: Path):
    there = image(tmp_path / "far" / "x.png")
    (tmp_path / "far" / "inner").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "far" / "inner")
    (entry,), _ = read(subset(write(tmp_path / "m.json", {"link/../x.png": {}}), image_dir=tmp_path / "images"))
    assert entry.path.samefile(there)


@pytest.mark.skipif(os.name == "nt", reason="there it is a separator")
def test_backslashes_of_windows(tmp_path: Path):
    first, odd = image(tmp_path / "sub" / "x.png"), image(tmp_path / "sub\\y.png")
    path = write(tmp_path / "m.json", {"sub\\x.png": {}, "sub\\y.png": {}, "sub\\gone.png": {}})
    entries, _ = read(subset(path, image_dir=tmp_path))
    assert [entry.path for entry in entries] == [first, odd, tmp_path / "sub\\gone.png"]


def test_names_that_look_misspelt(tmp_path: Path):
    path = write(tmp_path / "m.json", {
        "a.png": {"captoin": "x"},
        "b.png": {"captoin": "x", "image_size": [1, 2], "rating": "g"},
        "c.png": {"caption": "x", "captions": ["x"], "custom_attributes": {"diff_output_preservaton": True, "mood": "fine"}},
        "d.png": {"image_size": [1, 2], "train_resolution": [3, 4], "latents": 1, "custom_attributes": {}},
    })  # fmt: skip
    found = read_metadata(subset(path), ALWAYS_READ)
    assert found.problems == []
    assert found.warnings == [
        f'my.toml, subset 1: 2 entries of {path} (such as a.png) have neither "caption" nor "tags", but "captoin" (did you mean '
        "caption?)",
        f'my.toml, subset 1: 1 entries of {path} (such as c.png) have the attribute "diff_output_preservaton", which training does '
        "not know (did you mean diff_output_preservation?)",
    ]
