"""Masks from images and from alpha channels: they must lie over their pictures exactly, however these are cut out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.augment import placement_for
from library.dataset.buckets import Buckets, Placement
from library.dataset.images import load_picture
from library.dataset.items import DatasetSettings, Item, SubsetSettings
from library.dataset.masks import LATENT_PX, on_latent_grid, read_mask
from library.errors import DatasetError


def item(path: Path, *, size_wh, mask_path: Path | None = None, resolution=(64, 64), buckets=True, **settings: object) -> Item:
    subset = SubsetSettings(place="test", image_dir=None, **settings)
    dataset = DatasetSettings(place="test", resolution_wh=resolution, enable_bucket=buckets, min_bucket_reso=32,
                              max_bucket_reso=256, bucket_reso_steps=16, subsets=(subset,))  # fmt: skip
    placed = Buckets(dataset).place(size_wh)
    return Item(index=0, key="0:0:x", path=path, caption="", dataset_index=0, subset=subset, repeats=1, size_wh=size_wh,
                bucket_wh=placed.bucket_wh, resized_wh=placed.resized_wh, crop_left_top=placed.crop_left_top,
                mask_path=mask_path, has_alpha="alpha_mask" in settings, is_bucketed=buckets)  # fmt: skip


def blots(width: int, height: int) -> Image.Image:
    """Grey blots, mode L."""
    coarse = np.random.default_rng(width).integers(0, 256, (7, 9), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def blocks(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> means of the red of 8x8 pixels, in [0, 1]"""
    height, width = pixels.shape[:2]
    return pixels[..., 0].reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3)) / 255


# ------------------------------------------------------------------ a mask that shows the picture itself must stay equal to it


CUTS = {
    "bucket": {},
    "steps of 16": {"resolution": (80, 48)},
    "no buckets": {"buckets": False},
    "random": {"random_crop": True},
    "window of the full size": {"random_crop": True, "buckets": False},
    "explicit": {"resize_interpolation": "area"},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("size_wh", [(301, 203), (140, 290), (70, 69), (40, 30), (1001, 601)])
def test_mask_goes_the_way_of_its_image(cut: str, size_wh: tuple[int, int], tmp_path: Path):
    """The reference squeezes the whole mask into the bucket instead."""
    image, mask = tmp_path / "x.png", tmp_path / "m.png"
    blots(*size_wh).convert("RGB").save(image)
    blots(*size_wh).save(mask)
    masked = item(image, size_wh=size_wh, mask_path=mask, **CUTS[cut])
    for occurrence in range(2):
        placement = placement_for(masked, seed=0, epoch=1, occurrence=occurrence)
        found = load_picture(masked, placement=placement)
        assert found.mask is not None and found.mask.dtype == np.float32 and found.mask.flags["C_CONTIGUOUS"]
        assert found.mask.shape == (placement.bucket_wh[1] // 8, placement.bucket_wh[0] // 8)
        assert np.abs(found.mask - blocks(found.pixels)).max() < 0.02  # where it enlarges: linear against Lanczos


@pytest.mark.parametrize("cut", CUTS)
def test_mirrored_mask_is_the_mask_with_its_columns_reversed(cut: str, tmp_path: Path):
    image, mask = tmp_path / "x.png", tmp_path / "m.png"
    blots(301, 203).convert("RGB").save(image)
    blots(301, 203).save(mask)
    masked = item(image, size_wh=(301, 203), mask_path=mask, **CUTS[cut])
    placement = placement_for(masked, seed=0, epoch=1, occurrence=0)
    plain, flipped = (load_picture(masked, placement=placement, flipped=flipped) for flipped in (False, True))
    assert plain.mask is not None and flipped.mask is not None
    assert np.array_equal(flipped.mask, plain.mask[:, ::-1]) and flipped.mask.flags["C_CONTIGUOUS"]
    assert np.array_equal(flipped.pixels, plain.pixels[:, ::-1])
    assert not np.array_equal(flipped.mask, plain.mask)


@pytest.mark.parametrize("image_turn", [1, 3, 6])
@pytest.mark.parametrize("mask_turn", [1, 6, 8])
def test_image_and_mask_are_turned_each_by_its_own_exif(image_turn: int, mask_turn: int, tmp_path: Path):
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

    def save(picture: Image.Image, path: Path, turn: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = turn
        (picture if turn == 1 else picture.transpose(undo[turn])).save(path, exif=exif)

    save(blots(300, 200).convert("RGB"), tmp_path / "x.png", image_turn)
    save(blots(300, 200), tmp_path / "m.png", mask_turn)
    found = load_picture(item(tmp_path / "x.png", size_wh=(300, 200), mask_path=tmp_path / "m.png"))
    assert np.abs(found.mask - blocks(found.pixels)).max() < 0.01


def test_alpha_goes_the_way_of_its_image(tmp_path: Path):
    path = tmp_path / "x.png"
    opacity = blots(301, 203)
    rgba = opacity.convert("RGB").copy()
    rgba.putalpha(opacity)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    masked = item(path, size_wh=(301, 203), alpha_mask=True)
    found = load_picture(masked)
    assert np.abs(found.mask - blocks(found.pixels)).max() < 0.01
    assert np.array_equal(load_picture(masked, flipped=True).mask, found.mask[:, ::-1])


# ------------------------------------------------------------------ where the mask comes from


def half_and_half(low, high, mode: str = "L", size_wh=(64, 64)) -> Image.Image:
    image = Image.new(mode, size_wh, low)
    image.paste(high, (size_wh[0] // 2, 0, *size_wh))
    return image


def is_half(mask: np.ndarray | None, left: float = 0.0, right: float = 1.0) -> bool:
    assert mask is not None
    return bool(
        np.all(mask[:, : mask.shape[1] // 2] == np.float32(left)) and np.all(mask[:, mask.shape[1] // 2 :] == np.float32(right))
    )


def test_items_without_mask_have_none(tmp_path: Path):
    path = tmp_path / "x.png"
    half_and_half((1, 2, 3, 0), (1, 2, 3, 255), "RGBA").save(path)
    assert load_picture(item(path, size_wh=(64, 64))).mask is None


def test_mask_image_wins_over_alpha(tmp_path: Path):
    path, mask = tmp_path / "x.png", tmp_path / "m.png"
    half_and_half((1, 2, 3, 255), (1, 2, 3, 0), "RGBA").save(path)
    half_and_half(0, 255).save(mask)
    both = item(path, size_wh=(64, 64), mask_path=mask, alpha_mask=True)
    assert is_half(load_picture(both).mask, 0, 1)
    assert is_half(load_picture(replace(both, mask_path=None)).mask, 1, 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_image_that_lost_its_alpha_counts_everywhere(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    half_and_half((1, 2, 3), (200, 2, 3), "RGB").save(path)
    masked = item(path, size_wh=(64, 64), alpha_mask=True)
    mask = load_picture(masked).mask
    assert load_picture(replace(masked, has_alpha=False)).mask is None
    assert np.array_equal(mask, np.ones((8, 8), np.float32)) and mask.dtype == np.float32


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_of_every_kind(mode: str, tmp_path: Path):
    path = tmp_path / "x.png"
    if mode == "P":
        image = half_and_half(0, 1, "P")
        image.putpalette([9, 8, 7, 90, 80, 70])
        image.save(path, transparency=0)
    else:
        colour = (9,) * (len(mode) - 1)
        half_and_half((*colour, 0), (*colour, 255), mode).save(path)
    assert is_half(load_picture(item(path, size_wh=(64, 64), alpha_mask=True)).mask)


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        ("L", 0, 255),
        ("1", 0, 1),
        ("I;16", 0, 65535),
        ("RGB", (0, 255, 255), (255, 0, 0)),  # red counts, and nothing else
        ("RGBA", (0, 255, 255, 255), (255, 0, 0, 0)),
        ("LA", (0, 255), (255, 0)),
        ("P", 0, 1),
    ],
)
def test_mask_images_of_every_mode(mode: str, low, high, tmp_path: Path):
    image, mask = tmp_path / "x.jpg", tmp_path / "m.png"
    Image.new("RGB", (64, 64)).save(image)
    if mode == "I;16":
        values = np.full((64, 64), low, np.uint16)
        values[:, 32:] = high
        drawn = Image.fromarray(values)
    else:
        drawn = half_and_half(low, high, mode)
    if mode == "P":
        drawn.putpalette([0, 255, 255, 255, 0, 0])
    drawn.save(mask)
    assert is_half(load_picture(item(image, size_wh=(64, 64), mask_path=mask)).mask)


def test_values_between(tmp_path: Path):
    mask = Image.new("L", (64, 64), 51)
    mask.putpixel((0, 0), 255)
    found = on_latent_grid(mask, Placement((64, 64), (64, 64), (0, 0)))
    assert found[0, 0] == pytest.approx((51 * 63 + 255) / 64 / 255, abs=1e-6) and found[0, 1] == np.float32(0.2)


@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
@pytest.mark.parametrize("resized_wh", [(64, 64), (100, 70), (33, 64), (16, 16)])
def test_even_mask_stays_even(value: int, resized_wh: tuple[int, int]):
    found = on_latent_grid(Image.new("L", (77, 99), value), Placement((16, 16), resized_wh, (0, 0)))
    assert np.all(found == np.float32(value / 255)) and found.shape == (16 // LATENT_PX,) * 2


# ------------------------------------------------------------------ bad masks


@pytest.mark.parametrize("mask_wh", [(32, 32), (64, 63), (128, 128), (48, 64)])
def test_mask_of_another_size_names_both_files(mask_wh: tuple[int, int], tmp_path: Path):
    image, mask = tmp_path / "x.png", tmp_path / "masks.png"
    Image.new("RGB", (64, 64)).save(image)
    Image.new("L", mask_wh).save(mask)
    with pytest.raises(DatasetError) as caught:
        load_picture(item(image, size_wh=(64, 64), mask_path=mask))
    text = str(caught.value)
    assert str(image) in text and str(mask) in text and f"{mask_wh[0]}x{mask_wh[1]}" in text and "64x64" in text


def test_turned_mask_is_measured_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 64)).save(tmp_path / "m.png", exif=exif)
    assert read_mask(tmp_path / "m.png", image=Path("x.png"), size_wh=(64, 40)).size == (64, 40)


@pytest.mark.parametrize("damage", ["empty", "text", "cut short", "gone", "folder"])
def test_broken_mask_is_named(damage: str, tmp_path: Path):
    image, mask = tmp_path / "x.png", tmp_path / "m.png"
    Image.new("RGB", (64, 64)).save(image)
    if damage == "cut short":
        Image.effect_noise((64, 64), 90).save(mask)
        mask.write_bytes(mask.read_bytes()[:1500])
    elif damage == "folder":
        mask.mkdir()
    elif damage != "gone":
        mask.write_text("" if damage == "empty" else "no image")
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        load_picture(item(image, size_wh=(64, 64), mask_path=mask))
    assert str(mask) in str(caught.value)
