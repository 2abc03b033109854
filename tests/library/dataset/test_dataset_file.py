"""Dataset files: syntax errors with their place, and paths that are found or missed with a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.dataset.dataset_file import find_path, missing_path_problem, read_dataset_file
from library.errors import DatasetError


def problem(path: Path, content: str | bytes | None) -> str:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as caught:
        read_dataset_file(path)
    return str(caught.value)


def test_toml_and_json_with_byte_order_mark(tmp_path: Path):
    (tmp_path / "a.toml").write_bytes("\ufeff[general]\nresolution = 512 # 日本\n".encode())
    (tmp_path / "a.JSON").write_text('{"general": {"resolution": null}}')
    assert read_dataset_file(tmp_path / "a.toml") == {"general": {"resolution": 512}}
    assert read_dataset_file(tmp_path / "a.JSON") == {"general": {"resolution": None}}


@pytest.mark.parametrize(
    "content", ["[general]\nresolution = = 5\n", "[general]\nx = 'a\n", "[general]\n\n\nresolution 5\n", "[[datasets]\n"]
)
def test_toml_syntax_error_names_file_and_line(content: str, tmp_path: Path):
    assert "bad.toml, line" in problem(tmp_path / "bad.toml", content)


def test_backslashes_of_windows_paths(tmp_path: Path):
    text = problem(tmp_path / "bad.toml", '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\data\\images"\n')
    assert "bad.toml, line" in text and "in Windows paths write / or put the path in single quotes" in text


def test_json_syntax_error(tmp_path: Path):
    assert "bad.json, line 2, column 1" in problem(tmp_path / "bad.json", '{"general": {},\n}')
    assert "must hold one object" in problem(tmp_path / "bad.json", "[]")


def test_a_key_that_stands_twice(tmp_path: Path):
    text = problem(tmp_path / "bad.json", '{"general": {"resolution": 512, "flip_aug": true, "flip_aug": false}}')
    assert text.endswith("bad.json: flip_aug stands twice in one object: take one of the two out")
    twice = problem(tmp_path / "bad.toml", "[general]\nresolution = 512\nresolution = 768\n")
    assert "bad.toml, line 3" in twice and twice.endswith("; the line is: resolution = 768")


@pytest.mark.parametrize("content", ['{"a": ' + "9" * 5000 + "}", '{"a": ' + "[" * 100_000], ids=["digits", "brackets"])
def test_json_that_no_one_writes_by_hand(content: str, tmp_path: Path):
    assert problem(tmp_path / "bad.json", content).startswith(f"{tmp_path / 'bad.json'}")


def test_wrong_kind_of_file(tmp_path: Path):
    assert "byte 1 is not UTF-8" in problem(tmp_path / "x.toml", b"a\xff")
    assert "ends in .toml or .json" in problem(tmp_path / "x.yaml", "a: 1")
    (tmp_path / "real.toml").touch()
    assert "rael.toml does not exist (did you mean real.toml?)" in problem(tmp_path / "rael.toml", None)
    (tmp_path / "folder.toml").mkdir()
    assert "is a folder, not a file" in problem(tmp_path / "folder.toml", None)


def test_paths_are_tried_from_here_and_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    (here / "both").mkdir(parents=True)
    (beside / "both").mkdir(parents=True)
    (beside / "only").mkdir()
    monkeypatch.chdir(here)
    assert find_path("both", beside) == Path("both")
    assert find_path("only", beside) == beside / "only"
    assert find_path("none", beside) == Path("none")
    assert find_path(str(beside / "only"), None) == beside / "only"


def test_missing_folder_suggests_a_near_name(tmp_path: Path):
    (tmp_path / "images" / "cats").mkdir(parents=True)
    assert missing_path_problem(tmp_path / "images" / "cats", folder=True) is None
    assert "does not exist (did you mean cats?)" in (missing_path_problem(tmp_path / "images" / "cat", folder=True) or "")
    assert "(did you mean images?)" in (missing_path_problem(tmp_path / "image" / "cats", folder=True) or "")
    assert f"(there is no {tmp_path / 'q'})" in (missing_path_problem(tmp_path / "q" / "cats", folder=True) or "")
    file = tmp_path / "file"
    file.touch()
    assert "is a file, not a folder" in (missing_path_problem(file, folder=True) or "")
