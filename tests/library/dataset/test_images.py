"""Real image files of every kind: size, pixels, and what is wrong with the bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.images import load_pixels
from library.dataset.items import Item, SubsetSettings
from library.dataset.resizing import resize
from library.dataset.verify import read_record
from library.errors import DatasetError

RED, GREEN, BLUE = (220, 30, 40), (30, 200, 60), (20, 40, 210)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Red left half, green top right, blue bottom right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (width // 2, height // 2, width, height))
    return image


def noise(width: int = 200, height: int = 150) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def item(path: Path, *, size_wh=(60, 40), bucket_wh=(32, 32), resized_wh=(48, 32), crop=(8, 0), interpolation=None) -> Item:
    subset = SubsetSettings(place="test", image_dir=path.parent, resize_interpolation=interpolation)
    return Item(index=0, key="0:0:x", path=path, caption="", dataset_index=0, subset=subset, repeats=1, size_wh=size_wh,
                bucket_wh=bucket_wh, resized_wh=resized_wh, crop_left_top=crop)  # fmt: skip


def near(pixel: np.ndarray, colour: tuple[int, int, int], *, within: int = 12) -> bool:
    return bool(np.abs(pixel.astype(int) - np.array(colour)).max() <= within)


def problem(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_truncated_file(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    noise().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "cannot be read" in problem(path)


def test_truncated_progressive_jpeg(tmp_path: Path):
    path = tmp_path / "x.jpg"
    noise().save(path, progressive=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated" in problem(path)


def test_bad_files(tmp_path: Path):
    empty, text, folder = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "folder.png"
    empty.touch()
    text.write_text("not an image")
    folder.mkdir()
    assert "the file is empty (0 bytes)" in problem(empty)
    assert "no image that Pillow knows" in problem(text)
    assert "cannot be read" in problem(folder)
    assert "the file is not there" in problem(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("size", "words"), [((1, 1), "too small (1x1)"), ((300, 8), "too small"), ((40_000, 20), "no side may be over 32,767")]
)
def test_impossible_sizes(size: tuple[int, int], words: str, tmp_path: Path):
    path = tmp_path / "x.png"
    Image.new("L", size).save(path)
    assert words in problem(path)


def test_decompression_bomb(tmp_path: Path):
    path = tmp_path / "x.png"
    Image.new("1", (16_000, 12_000)).save(path)
    assert "too large" in problem(path)


def test_load_pixels_resizes_crops_and_flips(tmp_path: Path):
    path = tmp_path / "x.png"
    picture().save(path)
    pixels = load_pixels(item(path))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
    assert near(pixels[16, 2], RED) and near(pixels[4, 28], GREEN)
    flipped = load_pixels(item(path), flipped=True)
    assert np.array_equal(flipped, pixels[:, ::-1]) and flipped.flags["C_CONTIGUOUS"]


def test_interpolation_of_the_subset_is_used(tmp_path: Path):
    path = tmp_path / "x.png"
    noise(60, 40).save(path)
    results = {
        name: load_pixels(item(path, interpolation=name)).tobytes()
        for name in (None, "lanczos", "nearest", "bilinear", "cubic", "area")
    }
    assert results["area"] == results[None]
    assert len(set(results.values())) == len(results) - 1


def test_file_that_breaks_or_changes_after_the_scan(tmp_path: Path):
    path = tmp_path / "x.png"
    picture(80, 40).save(path)
    with pytest.raises(DatasetError, match="x.png is 80x40 now but was 60x40"):
        load_pixels(item(path))
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="x.png cannot be read: the file is empty"):
        load_pixels(item(path))


def test_resize_to_the_same_size_changes_nothing():
    assert np.array_equal(resize(noise(), (200, 150), interpolation="lanczos"), np.asarray(noise()))
