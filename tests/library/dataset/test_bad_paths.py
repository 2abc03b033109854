"""Every path that a dataset file or a flag can name, and what no path can be: one line each, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.library.dataset.dataset_files import document, problems, read, write

TOO_LONG = "x" * 300
BAD = {
    "loop": "is a link that leads nowhere (to loop)",
    "in a loop": "is a link that leads nowhere (to loop/x)",
    "dead": "is a link that leads nowhere (to gone)",
    "~no_such_user/x": "no user no_such_user is known here",
    "p\0x": "holds a NUL character",
    TOO_LONG: "is longer than a path can be here",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "x.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "in a loop").symlink_to("loop/x")
    (tmp_path / "dead").symlink_to("gone")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["image_dir", "conditioning_data_dir", "metadata_file"])
@pytest.mark.parametrize("bad", BAD, ids=lambda text: text[:9].replace("\0", "NUL"))
@pytest.mark.parametrize("ending", [".toml", ".json"])
def test_in_a_dataset_file(name: str, bad: str, ending: str, folder: Path):
    content = document("images", subset={name: bad})
    text = json.dumps(content) if ending == ".json" else None
    path = write(folder, text or _toml(content), f"my{ending}")
    (problem,) = problems(dataset_config=path, masked_loss=True)
    assert problem.startswith(f"my{ending}, [[datasets]] 1, subset 1: {name} ") and BAD[bad] in problem


@pytest.mark.parametrize("bad", ["loop", "in a loop", "dead", TOO_LONG])
@pytest.mark.parametrize("flag", ["dataset_config", "train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"])
def test_of_a_flag(flag: str, bad: str, folder: Path):
    (folder / "train" / "2_cat").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "train" / "2_cat" / "x.png")
    values = {"train_data_dir": "train", "resolution": "64", "masked_loss": flag == "conditioning_data_dir"}
    name = f"{bad}.toml" if flag == "dataset_config" else bad
    if flag == "dataset_config" and bad != TOO_LONG:
        (folder / name).symlink_to((folder / bad).readlink().with_suffix(".toml"))
    (problem,) = problems(**{**values, flag: Path(name) if flag == "dataset_config" else name})
    assert f"--{flag}" in problem
    assert "is a link that leads nowhere" in problem if bad != TOO_LONG else "too long" in problem


def test_a_link_that_leads_somewhere_is_the_folder_itself(folder: Path):
    (folder / "linked").symlink_to("images")
    content = document("images")
    content["datasets"][0]["subsets"].append({"image_dir": "linked"})
    (dataset,) = read(dataset_config=write(folder, content))
    assert len(dataset.subsets) == 1 and "linked is already in my.toml, [[datasets]] 1, subset 1" in dataset.warnings[0]


def test_a_folder_whose_name_begins_with_a_tilde(folder: Path):
    (folder / "~no_such_user").symlink_to("images")
    assert read(dataset_config=write(folder, document("./~no_such_user")))
    (folder / "~train").mkdir()
    (folder / "~train" / "2_cat").symlink_to("../images")
    assert read(train_data_dir="./~train", resolution="64")


def test_an_empty_path(folder: Path):
    for name, words in (("image_dir", "a folder"), ("conditioning_data_dir", "a folder"), ("metadata_file", "a file")):
        path = write(folder, document("images", subset={name: ""}))
        assert problems(dataset_config=path) == [
            f"my.toml, [[datasets]] 1, subset 1: {name} is empty: name {words}, or leave it out"
        ]


def _toml(content: dict) -> str:
    """The toml package writes NUL characters as they are, which it does not read."""
    general, (dataset,) = content["general"], content["datasets"]
    lines = [f"{key} = {json.dumps(value)}" for subset in dataset["subsets"] for key, value in subset.items()]
    return "\n".join([f"[general]\nresolution = {general['resolution']}\n[[datasets]]\n[[datasets.subsets]]", *lines])
