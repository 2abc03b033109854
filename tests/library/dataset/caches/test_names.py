from __future__ import annotations

import os
from pathlib import Path

import pytest

from library.dataset.caches.names import CacheNames


def test_beside_the_image_or_in_one_folder(tmp_path: Path) -> None:
    beside = CacheNames(None)
    assert beside.path(tmp_path / "a.png", "64x64.tiny-latents") == str(tmp_path / "a.png.64x64.tiny-latents.safetensors")
    assert beside.path(Path("a.png"), "tiny-text") == "a.png.tiny-text.safetensors"
    elsewhere = Path(CacheNames(tmp_path / "cache").path(tmp_path / "a.png", "tiny-text"))
    assert elsewhere.parent == tmp_path / "cache"
    assert elsewhere.name.endswith("-a.png.tiny-text.safetensors")


def test_a_cache_folder_keeps_equal_names_of_two_folders_apart(tmp_path: Path) -> None:
    names = CacheNames(tmp_path / "cache")
    assert names.path(tmp_path / "one" / "a.png", "x") != names.path(tmp_path / "two" / "a.png", "x")


def test_a_relative_folder_is_the_absolute_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = CacheNames(tmp_path / "cache")
    assert names.path(Path("pictures/a.png"), "x") == names.path(tmp_path / "pictures" / "a.png", "x")


def test_a_folder_that_is_named_in_many_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    ways = [folder, Path("pictures"), Path("pictures/sub/.."), folder / "sub" / ".."]
    if os.name != "nt":  # where links need rights
        (tmp_path / "link").symlink_to(folder)
        ways.append(tmp_path / "link")
    for cache_dir in (None, tmp_path / "cache"):
        names = CacheNames(cache_dir)
        assert len({names.one_name(way / "a.png") for way in ways}) == 1
        assert len({names.path(way / "a.png", "x") for way in ways}) == 1
        assert names.one_name(tmp_path / "a.png") != names.one_name(folder / "a.png") != names.one_name(folder / "b.png")
    assert len({CacheNames(tmp_path / "cache").path(way / "a.png", "x") for way in ways}) == 1  # from run to run


def test_where_letter_case_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.png": 1, "b.png": 2, "stra\u00dfe.png": 3, "STRASSE.PNG": 4}

    def number(path: str) -> int:
        name = Path(path).name
        return files.get(name) or {known.lower(): n for known, n in files.items()}[name.lower()]

    monkeypatch.setattr(os.path, "samefile", lambda one, other: number(one) == number(other))
    names = CacheNames(None)
    assert names.path(tmp_path / "a.png", "x") == names.path(tmp_path / "A.png", "x") == names.path(tmp_path / "a.PNG", "x")
    every = ("a.png", "A.PNG", "B.png", "b.png", "stra\u00dfe.png", "STRASSE.PNG", "Strasse.png")
    assert len({names.one_name(tmp_path / name) for name in every}) == 4


def test_a_file_of_other_letter_case_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "A.PNG").touch()
    count = len(list(tmp_path.iterdir()))
    names = CacheNames(None)
    assert len({names.path(tmp_path / name, "x") for name in ("a.png", "A.PNG")}) == count


def test_a_very_long_name_is_shortened_and_stays_unique(tmp_path: Path) -> None:
    paths = [CacheNames(None).path(tmp_path / ("ü" * 120 + f"{n}.png"), "1024x1024.tiny-latents") for n in (1, 2)]
    assert paths[0] != paths[1]
    for path in paths:
        assert len(os.fsencode(Path(path).name)) <= 230
        Path(path).touch()


def test_a_long_name_that_fits_stays_as_it_is(tmp_path: Path) -> None:
    name = "a" * 150 + ".png"
    assert CacheNames(None).path(tmp_path / name, "tiny-text") == str(tmp_path / f"{name}.tiny-text.safetensors")
