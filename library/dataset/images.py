"""From an image file to what is trained: its pixels, and the mask of its loss.

Everything happens on the upright picture: EXIF orientation is applied first (the reference ignores it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from library.dataset.buckets import Placement, Size
from library.dataset.items import Item
from library.dataset.masks import on_latent_grid, read_mask
from library.dataset.picture_file import alpha, opened, rgb, upright
from library.dataset.resizing import AVERAGING, halved, resize
from library.dataset.verify import SWAPS_SIDES, orientation, size_text
from library.errors import DatasetError

if TYPE_CHECKING:
    from library.dataset.augment import ColourChange

SCALED_BY_DECODER = ("JPEG", "MPO")


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One showing of one image. Latent grid (h, w) = pixel size / 8."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB, contiguous
    mask: np.ndarray | None  # (h, w) float32 in [0, 1], 1 = counts fully; None where the item is not masked


def load_picture(
    item: Item, *, placement: Placement | None = None, colours: ColourChange | None = None, flipped: bool = False
) -> Picture:
    """The image and its mask, resized and cropped as ``placement`` says (by default the item's own), and mirrored if ``flipped``.

    The mask comes from the item's mask image, else from the image's alpha channel where the subset has alpha_mask. Colours are
    changed last, where the fewest pixels are left.

    Raises DatasetError naming the files when one cannot be read (any more), has another size than at the scan, or when the mask
    has not the size of its image.
    """
    placement = placement or Placement.of(item)
    wants_alpha = item.mask_path is None and item.subset.alpha_mask
    image, opacity = _read(item, placement, wants_alpha=wants_alpha)
    pixels = _cut_out(image, placement, interpolation=item.subset.resize_interpolation)
    if colours is not None:
        pixels = colours.applied_to(pixels)
    mask = None
    if item.mask_path is not None:
        mask = on_latent_grid(read_mask(item.mask_path, image=item.path, size_wh=item.size_wh), placement)
    elif wants_alpha:
        mask = on_latent_grid(opacity, placement)
    return Picture(_mirrored(pixels, flipped), None if mask is None else _mirrored(mask, flipped))


def load_pixels(item: Item, *, flipped: bool = False) -> np.ndarray:
    """The item's own crop without its mask: (H, W, 3) uint8 RGB, contiguous. Raises as ``load_picture`` does."""
    placement = Placement.of(item)
    image, _ = _read(item, placement, wants_alpha=False)
    return _mirrored(_cut_out(image, placement, interpolation=item.subset.resize_interpolation), flipped)


def _read(item: Item, placement: Placement, *, wants_alpha: bool) -> tuple[Image.Image, Image.Image | None]:
    """The upright RGB image, perhaps shrunk already but no smaller than it will be, and its alpha channel in full size."""
    may_shrink = item.subset.resize_interpolation in AVERAGING
    with opened(item.path) as file:
        if file.format not in SCALED_BY_DECODER:
            file.load()  # first: a PNG may tell its orientation at its very end
        turn = orientation(file)
        found_wh, goal_wh = _turned(file.size, turn), _turned(placement.resized_wh, turn)
        if found_wh != item.size_wh:
            raise DatasetError(
                f"{item.path} is {size_text(found_wh)} now but was {size_text(item.size_wh)} when the run began: start again"
            )
        drafted = file.draft(None, goal_wh) if may_shrink else None  # only JPEG takes it
        file.load()
        opacity = alpha(file) if wants_alpha else None
        image = rgb(file)
        if may_shrink:
            image = halved(image, goal_wh, covers_wh=drafted[1][2:] if drafted else None)
        return upright(image, turn), None if opacity is None else upright(opacity, turn)


def _cut_out(image: Image.Image, placement: Placement, *, interpolation: str | None) -> np.ndarray:
    """(H, W, 3) uint8"""
    (left, top), (width, height) = placement.crop_left_top, placement.bucket_wh
    if image.size == placement.resized_wh != placement.bucket_wh:
        return np.asarray(image.crop((left, top, left + width, top + height)))
    return resize(image, placement.resized_wh, interpolation=interpolation)[top : top + height, left : left + width]


def _turned(size_wh: Size, exif_orientation: int) -> Size:
    """The upright size of a stored picture, and the stored size of an upright one."""
    return (size_wh[1], size_wh[0]) if exif_orientation in SWAPS_SIDES else size_wh


def _mirrored(values: np.ndarray, flipped: bool) -> np.ndarray:
    """(H, W, ...) -> the same with its columns reversed if ``flipped``; contiguous."""
    return np.ascontiguousarray(values[:, ::-1] if flipped else values)
