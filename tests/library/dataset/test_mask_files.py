"""Images and their masks are paired by name, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.dataset.folders import ALWAYS_READ
from library.dataset.image_records import ImageRecords
from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.mask_files import MaskFolders
from library.dataset.scan import scan
from library.errors import DatasetError


def picture(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 77 if mode == "L" else "red").save(path, **options)
    return path


def subset(tmp_path: Path, **settings) -> SubsetSettings:
    values = {"place": "my.toml, subset 1", "image_dir": tmp_path / "images", "conditioning_data_dir": tmp_path / "masks",
              "caption_extension": ".txt", "class_tokens": "cat"}  # fmt: skip
    return SubsetSettings(**values | settings)


def dataset(*subsets: SubsetSettings) -> DatasetSettings:
    return DatasetSettings(place="my.toml, [[datasets]] 1", resolution_wh=(64, 64), subsets=subsets)


def problems(*subsets: SubsetSettings, **options) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        scan((dataset(*subsets),), **options)
    return list(caught.value.problems)


def test_masks_are_found_by_base_name_whatever_their_kind(tmp_path: Path):
    images = [picture(tmp_path / "images" / name) for name in ("a.png", "b.c.jpg", "日本.webp")]
    masks = [picture(tmp_path / "masks" / name, mode="L") for name in ("a.PNG", "b.c.bmp", "日本.jpeg")]
    data = scan((dataset(subset(tmp_path)),))
    assert {item.path: item.mask_path for item in data.items} == dict(zip(images, masks, strict=True))
    assert all(item.is_masked for item in data.items)
    assert data.warnings == ()


def test_without_a_mask_folder_nothing_is_masked(tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "masks" / "a.png")
    (item,) = scan((dataset(subset(tmp_path, conditioning_data_dir=None)),)).items
    assert item.mask_path is None and not item.is_masked


def test_missing_masks_are_listed_together_and_can_be_left_out(tmp_path: Path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    picture(tmp_path / "masks" / "b.png")
    found = problems(subset(tmp_path))
    assert found[:2] == [f"{tmp_path}/images/{name}.png has no mask: no {name}.* in {tmp_path}/masks" for name in "ac"]
    assert found[2].startswith("2 bad image(s)") and "--skip_bad_images" in found[2]
    data = scan((dataset(subset(tmp_path)),), skip_bad_images=True)
    assert [item.path.name for item in data.items] == ["b.png"] and len(data.skipped) == 2


def test_two_masks_for_one_image(tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    for name in ("a.png", "a.jpg"):
        picture(tmp_path / "masks" / name)
    picture(tmp_path / "images" / "b.png")
    picture(tmp_path / "masks" / "b.png")
    text = f"{tmp_path}/images/a.png has 2 masks in {tmp_path}/masks: a.jpg, a.png; keep one of them"
    assert problems(subset(tmp_path))[0] == text
    data = scan((dataset(subset(tmp_path)),), skip_bad_images=True)
    assert data.skipped == (text,) and [item.path.name for item in data.items] == ["b.png"]
    assert data.warnings == ()


def test_masks_without_an_image(tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    for name in ("a.png", "other.png", "some.jpg"):
        picture(tmp_path / "masks" / name)
    (warning,) = scan((dataset(subset(tmp_path)),)).warnings
    assert warning.startswith(f"my.toml, subset 1: 2 masks in {tmp_path}/masks belong to no image (such as other.png)")


def test_a_mask_folder_is_judged_over_all_subsets_that_use_it(tmp_path: Path):
    subsets = []
    for folder, names in (("5_cat", "ab"), ("3_dog", "cd"), ("1_cow", "a")):
        for name in names:
            picture(tmp_path / folder / f"{name}.png")
        subsets.append(subset(tmp_path, image_dir=tmp_path / folder, place=f"subset {folder}"))
    for name in "abcde":
        picture(tmp_path / "masks" / f"{name}.png", mode="L")
    datasets = (dataset(*subsets[:2]), dataset(subsets[2]))
    (warning,) = scan(datasets).warnings
    assert warning.startswith(f"subset 5_cat: 1 masks in {tmp_path}/masks belong to no image (such as e.png)")
    (tmp_path / "masks" / "e.png").unlink()
    assert scan(datasets).warnings == ()


def test_masks_of_images_that_are_left_out_are_not_told(tmp_path: Path):
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.png")
        picture(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "images" / "b.txt").write_bytes(b"\xff")
    data = scan((dataset(subset(tmp_path)),), skip_bad_images=True)
    assert len(data.items) == 1 and data.warnings == ()


def test_masks_of_kinds_that_are_not_read(tmp_path: Path):
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.png")
    picture(tmp_path / "masks" / "a.png")
    picture(tmp_path / "masks" / "b.GIF")
    found = problems(subset(tmp_path))
    assert found[0] == (f"{tmp_path}/images/b.png has no mask: no b.* in {tmp_path}/masks; b.GIF is there, but gif is not read")
    (warning,) = scan((dataset(subset(tmp_path)),), skip_bad_images=True).warnings
    assert f"conditioning_data_dir {tmp_path}/masks: pictures of these kinds are not read and are left out: 1 .gif" in warning


def test_a_mask_of_another_size_names_both_files_and_sizes(tmp_path: Path):
    image = picture(tmp_path / "images" / "a.png", (64, 48))
    mask = picture(tmp_path / "masks" / "a.png", (48, 64))
    found = problems(subset(tmp_path))
    assert found[0] == f"the mask {mask} is 48x64, but its image {image} is 64x48: a mask must have the size of its image"


def test_sizes_are_those_of_the_upright_pictures(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images" / "a.jpg", (64, 48), exif=exif)
    picture(tmp_path / "masks" / "a.png", (48, 64))
    (item,) = scan((dataset(subset(tmp_path)),)).items
    assert item.size_wh == (48, 64)


def test_a_damaged_mask_is_named_with_its_image(tmp_path: Path):
    image = picture(tmp_path / "images" / "a.png")
    mask = picture(tmp_path / "masks" / "a.png")
    mask.write_bytes(mask.read_bytes()[:-40])
    found = problems(subset(tmp_path))
    assert found[0].startswith(f"{mask} cannot be read") and found[0].endswith(f"(it is the mask of {image})")


@pytest.mark.parametrize("exists", [True, False])
def test_a_mask_folder_without_masks(exists: bool, tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    if exists:
        (tmp_path / "masks").mkdir()
    text = problems(subset(tmp_path))[0]
    assert text.startswith("my.toml, subset 1") and "conditioning_data_dir" in text and str(tmp_path / "masks") in text


def test_masks_are_remembered_like_images(tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    mask = picture(tmp_path / "masks" / "a.png")
    told: list[tuple[int, int]] = []

    def start() -> ImageRecords:
        records = ImageRecords()
        scan((dataset(subset(tmp_path)),), records=records, progress=lambda done, total: told.append((done, total)))
        return records

    start()
    assert told == [(1, 2), (2, 2)]
    assert start().identity(mask).size == mask.stat().st_size
    assert told == [(1, 2), (2, 2)]


def test_alpha_masks_without_an_alpha_channel(tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    settings = subset(tmp_path, conditioning_data_dir=None, alpha_mask=True)
    (warning,) = scan((dataset(settings),)).warnings
    assert "my.toml, subset 1: alpha_mask is on, but none of its images has an alpha channel" in warning
    picture(tmp_path / "images" / "b.png", mode="RGBA")
    data = scan((dataset(settings),))
    assert data.warnings == ()
    assert [(item.path.name, item.is_masked) for item in data.items] == [("a.png", False), ("b.png", True)]
    plain = scan((dataset(subset(tmp_path, conditioning_data_dir=None)),))
    assert not any(item.is_masked for item in plain.items)


def test_two_images_of_one_name_share_their_mask(tmp_path: Path):
    images = [picture(tmp_path / "images" / name) for name in ("a.jpg", "a.png")]
    mask = picture(tmp_path / "masks" / "a.png")
    assert MaskFolders(ALWAYS_READ).pair(subset(tmp_path), images).masks == [mask, mask]


def test_a_metadata_file_can_have_masks(tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    mask = picture(tmp_path / "masks" / "a.png")
    (tmp_path / "m.json").write_text('{"a.png": {"caption": "cat"}}')
    (item,) = scan((dataset(subset(tmp_path, metadata_file=tmp_path / "m.json")),)).items
    assert item.mask_path == mask
