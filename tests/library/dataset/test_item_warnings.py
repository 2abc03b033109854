"""Warnings about images that are used."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.scan import scan


def warnings(folder: Path, *names: str, **settings) -> list[str]:
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / name)
    subset = SubsetSettings(place="here", image_dir=folder, class_tokens="cat", **settings)
    return list(scan((DatasetSettings(place="set", resolution_wh=(32, 32), subsets=(subset,)),)).warnings)


def test_face_crops_without_faces(tmp_path: Path):
    (warning,) = warnings(tmp_path, "girl_30_30_20_20.png", "a.png", "2024_01_02_03.png", face_crop_aug_range=(1.0, 2.0))
    assert warning.startswith(
        "here: face_crop_aug_range is set, but the names of 2 of 3 images (such as 2024_01_02_03.png) tell of no face: "
        "these are cropped in the middle; a name must end in _x_y_width_height"
    )
    (warning,) = warnings(tmp_path, face_crop_aug_range=(1.0, 2.0), random_crop=True)
    assert "these are cropped at random" in warning
    assert warnings(tmp_path) == []


def test_face_crops_with_faces(tmp_path: Path):
    assert warnings(tmp_path, "girl_30_30_20_20.png", face_crop_aug_range=(1.0, 2.0)) == []
