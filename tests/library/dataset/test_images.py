"""Real image files of every kind: size, pixels, and what is wrong with the bad ones."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.dataset import images
from library.dataset.augment import ColourChange
from library.dataset.buckets import Placement
from library.dataset.images import load_picture
from library.dataset.items import Item, SubsetSettings
from library.dataset.picture_file import loaded_upright, opened, rgb
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


def test_load_picture_resizes_crops_and_flips(tmp_path: Path):
    path = tmp_path / "x.png"
    picture().save(path)
    pixels = load_picture(item(path)).pixels
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
    assert near(pixels[16, 2], RED) and near(pixels[4, 28], GREEN)
    flipped = load_picture(item(path), flipped=True).pixels
    assert np.array_equal(flipped, pixels[:, ::-1]) and flipped.flags["C_CONTIGUOUS"]


def test_interpolation_of_the_subset_is_used(tmp_path: Path):
    path = tmp_path / "x.png"
    noise(60, 40).save(path)
    results = {
        name: load_picture(item(path, interpolation=name)).pixels.tobytes()
        for name in (None, "lanczos", "nearest", "bilinear", "cubic", "area")
    }
    assert results["area"] == results[None]
    assert len(set(results.values())) == len(results) - 1


def test_file_that_breaks_or_changes_after_the_scan(tmp_path: Path):
    path = tmp_path / "x.png"
    picture(80, 40).save(path)
    with pytest.raises(DatasetError, match="x.png is 80x40 now but was 60x40"):
        load_picture(item(path))
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="x.png cannot be read: the file is empty"):
        load_picture(item(path))


# ------------------------------------------------------------------ large pictures are shrunk while they are decoded


def photo(width: int, height: int) -> Image.Image:
    """Shapes of all sizes, the smaller the fainter, and a little grain: what photos are made of."""
    rng = np.random.default_rng(width)
    pixels = rng.normal(128, 3, (height, width, 3))
    for cells in (4, 8, 16, 32, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 128.0) * 2 / cells
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def whole(path: Path, size_wh: tuple[int, int], resized_wh: tuple[int, int], interpolation: str | None = None) -> Item:
    """An item that is resized and not cropped."""
    return item(path, size_wh=size_wh, bucket_wh=resized_wh, resized_wh=resized_wh, crop=(0, 0), interpolation=interpolation)


def fully_decoded(path: Path, resized_wh: tuple[int, int]) -> np.ndarray:
    with opened(path) as file:
        return cv2.resize(np.asarray(rgb(loaded_upright(file))), resized_wh, interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    "resized_wh", [(500, 375), (481, 361), (300, 225), (250, 188), (236, 177), (125, 94), (101, 76), (61, 46)]
)  # of 1001x751: shrunk by 2 to 16, with whole pixels and parts of pixels left over
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_shrunk_while_decoding_is_nearly_the_area_of_all_pixels(suffix: str, resized_wh: tuple[int, int], tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    photo(1001, 751).save(path, quality=92)
    assert mean_difference(load_picture(whole(path, (1001, 751), resized_wh)).pixels, fully_decoded(path, resized_wh)) < 1.0


@pytest.mark.parametrize("width", [800, 801, 804, 807])
def test_shrinking_while_decoding_moves_nothing(width: int, tmp_path: Path):
    """A ramp from left to right: no more than a quarter of a pixel off anywhere, even at the far end."""
    path = tmp_path / "x.jpg"
    ramp = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (160, width, 3))
    Image.fromarray(np.rint(ramp).astype(np.uint8)).save(path, quality=100)
    found = load_picture(whole(path, (width, 160), (80, 16))).pixels[8, :, 0].astype(float)
    expected = fully_decoded(path, (80, 16))[8, :, 0].astype(float)
    step = 255 / 80  # from one pixel to the next
    assert np.abs(found - expected).max() < step / 4 + 1


@pytest.mark.parametrize("interpolation", ["lanczos", "box", "nearest", "bilinear", "linear", "bicubic", "cubic"])
def test_explicit_interpolation_sees_every_pixel(interpolation: str, tmp_path: Path):
    path = tmp_path / "x.jpg"
    photo(800, 600).save(path, quality=92)
    found = load_picture(whole(path, (800, 600), (160, 120), interpolation)).pixels
    with opened(path) as file:
        expected = resize(rgb(loaded_upright(file)), (160, 120), interpolation=interpolation)
    assert np.array_equal(found, expected)


def test_explicit_area_is_the_default(tmp_path: Path):
    path = tmp_path / "x.jpg"
    photo(800, 600).save(path, quality=92)
    assert np.array_equal(
        load_picture(whole(path, (800, 600), (130, 98), "area")).pixels, load_picture(whole(path, (800, 600), (130, 98))).pixels
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photo_is_shrunk_by_its_own_sides(orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stored 240x1200 and shown 1200x240: measured by the wrong sides the decoder would not shrink it at all."""
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (1200, 240) if orientation < 5 else (240, 1200)
    photo(*stored).save(path, exif=exif, quality=92)
    decoded: list[tuple[int, int]] = []
    monkeypatch.setattr(images, "rgb", lambda image: decoded.append(image.size) or rgb(image))
    found = load_picture(whole(path, (1200, 240), (290, 58))).pixels
    assert decoded == [(stored[0] // 4, stored[1] // 4)]
    assert found.shape == (58, 290, 3) and mean_difference(found, fully_decoded(path, (290, 58))) < 1.0


def test_large_cmyk_and_grey_photos(tmp_path: Path):
    for mode in ("CMYK", "L"):
        path = tmp_path / f"{mode}.jpg"
        photo(800, 600).convert(mode).save(path, quality=92)
        assert mean_difference(load_picture(whole(path, (800, 600), (160, 120))).pixels, fully_decoded(path, (160, 120))) < 1.0


def test_several_pictures_in_one_jpeg(tmp_path: Path):
    """As some phones and 3D cameras write them; the first one counts."""
    path = tmp_path / "x.jpg"
    photo(800, 600).save(path, "MPO", quality=92, save_all=True, append_images=[Image.new("RGB", (800, 600), BLUE)])
    with Image.open(path) as file:
        assert file.format == "MPO"
    assert mean_difference(load_picture(whole(path, (800, 600), (160, 120))).pixels, fully_decoded(path, (160, 120))) < 1.0


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_orientation_of_other_formats_is_known_before_they_shrink(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: red, which was left, is above
    picture(600, 400).save(path, exif=exif, lossless=True)
    found = load_picture(whole(path, (400, 600), (80, 120))).pixels
    assert near(found[10, 40], RED) and near(found[-10, 10], BLUE) and near(found[-10, -10], GREEN)


# ------------------------------------------------------------------ a placement and colours of a showing's own


def test_window_of_the_full_size_image(tmp_path: Path):
    path = tmp_path / "x.png"
    noise(200, 150).save(path)
    placement = Placement((64, 48), (200, 150), (31, 57))
    found = load_picture(item(path, size_wh=(200, 150)), placement=placement)
    assert np.array_equal(found.pixels, np.asarray(noise(200, 150))[57 : 57 + 48, 31 : 31 + 64])
    assert found.mask is None and found.pixels.flags["C_CONTIGUOUS"]


def test_colours_change_what_was_cropped(tmp_path: Path):
    path = tmp_path / "x.png"
    noise(60, 40).save(path)
    change = ColourChange(hue_steps=5, gamma=1.04)
    found = load_picture(item(path), colours=change, flipped=True).pixels
    assert np.array_equal(found, change.applied_to(load_picture(item(path)).pixels)[:, ::-1])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_file_that_is_cut_short_after_the_scan(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    noise(600, 400).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match="cannot be read"):
        load_picture(item(path, size_wh=(600, 400)))


def test_photo_that_is_replaced_by_one_of_another_size(tmp_path: Path):
    """Its size is that of the file, not of what the decoder has shrunk it to."""
    path = tmp_path / "x.jpg"
    photo(1600, 1200).save(path)
    with pytest.raises(DatasetError, match="x.jpg is 1600x1200 now but was 800x600"):
        load_picture(item(path, size_wh=(800, 600), resized_wh=(160, 120)))
