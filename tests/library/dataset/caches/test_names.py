from __future__ import annotations

import os
from pathlib import Path

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


def test_a_very_long_name_is_shortened_and_stays_unique(tmp_path: Path) -> None:
    paths = [CacheNames(None).path(tmp_path / ("ü" * 120 + f"{n}.png"), "1024x1024.tiny-latents") for n in (1, 2)]
    assert paths[0] != paths[1]
    for path in paths:
        assert len(os.fsencode(Path(path).name)) <= 230
        Path(path).touch()


def test_a_long_name_that_fits_stays_as_it_is(tmp_path: Path) -> None:
    name = "a" * 150 + ".png"
    assert CacheNames(None).path(tmp_path / name, "tiny-text") == str(tmp_path / f"{name}.tiny-text.safetensors")
