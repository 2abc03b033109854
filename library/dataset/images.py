"""From an image file to what is trained: its pixels, and the mask of its loss.

Everything happens on the upright picture: EXIF orientation is applied first (the reference ignores it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from library.dataset.buckets import Placement, Size
from library.dataset.items import Item
from library.dataset.masks import on_latent_grid, read_mask
from library.dataset.picture_file import alpha, loaded_upright, opened, rgb, upright
from library.dataset.verify import SWAPS_SIDES, orientation, size_text
from library.errors import DatasetError

if TYPE_CHECKING:
    from library.dataset.augment import ColourChange

PILLOW_RESIZERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
OPENCV_RESIZERS = {
    "nearest": "INTER_NEAREST_EXACT",
    "bilinear": "INTER_LINEAR",
    "linear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "cubic": "INTER_CUBIC",
    "area": "INTER_AREA",
}
AVERAGING = (None, "area", "box")  # means of means are means: shrinking in two steps is the same, but for a little softness
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


def read_rgb(path: Path) -> np.ndarray:
    """The whole upright picture (first frame of an animation) as (H, W, 3) uint8 RGB. Raises DatasetError naming the file."""
    with opened(path) as image:
        return np.asarray(rgb(loaded_upright(image)))


def resize(image: Image.Image, size_wh: Size, *, interpolation: str | None) -> np.ndarray:
    """An RGB image -> (height, width, 3) uint8.

    Without an explicit ``interpolation``: area averaging when neither side grows, Lanczos otherwise.
    """
    if image.size == size_wh:
        return np.asarray(image)
    if interpolation is None:
        interpolation = "area" if size_wh[0] <= image.width and size_wh[1] <= image.height else "lanczos"
    if interpolation in PILLOW_RESIZERS:
        return np.asarray(image.resize(size_wh, PILLOW_RESIZERS[interpolation]))
    import cv2

    return cv2.resize(np.asarray(image), size_wh, interpolation=getattr(cv2, OPENCV_RESIZERS[interpolation]))


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
        true_wh = drafted[1][2:] if drafted else file.size
        file.load()
        opacity = alpha(file) if wants_alpha else None
        image = rgb(file)
        if may_shrink:
            image = _halved(image, true_wh, goal_wh)
        return upright(image, turn), None if opacity is None else upright(opacity, turn)


def _halved(image: Image.Image, true_wh: tuple[float, float], goal_wh: Size) -> Image.Image:
    """Shrunk by the largest power of two that leaves both sides at least as long as ``goal_wh``; enlarged ones stay as they are.

    It is the rule by which a JPEG decoder shrinks, and costs a quarter of what averaging over odd windows does. ``true_wh``: what
    the image really covers, in its own pixels; a last row or column can stand for a part of a pixel only.
    """
    times = min(image.width // goal_wh[0], image.height // goal_wh[1])
    if times >= 2:
        factor = 1 << (times.bit_length() - 1)
        image = image.reduce(factor)
        true_wh = (true_wh[0] / factor, true_wh[1] / factor)
    # Rounded, at most half a pixel too much or too little is taken for picture. Never too few: true_wh is no less than goal_wh.
    kept_wh = (int(true_wh[0] + 0.5), int(true_wh[1] + 0.5))
    return image if kept_wh == image.size else image.crop((0, 0, *kept_wh))


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
