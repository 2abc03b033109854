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
from library.dataset.resizing import AVERAGING, resize
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


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A decoded file, as it is stored."""

    image: Image.Image  # RGB; of a JPEG perhaps shrunk already, but no smaller than it will be
    covers_wh: tuple[float, float]  # how much of ``image`` is picture, in its own pixels
    orientation: int  # EXIF
    opacity: Image.Image | None  # in full size


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
    wants_alpha = item.mask_path is None and item.is_masked
    source = _read(item, placement, wants_alpha=wants_alpha)
    pixels = _cut_out(source, placement, interpolation=item.subset.resize_interpolation)
    if colours is not None:
        pixels = colours.applied_to(pixels)
    mask = None
    if item.mask_path is not None:
        mask = on_latent_grid(read_mask(item.mask_path, image=item.path, size_wh=item.size_wh), placement)
    elif wants_alpha:
        opacity = None if source.opacity is None else upright(source.opacity, source.orientation)
        mask = on_latent_grid(opacity, placement)
    return Picture(_mirrored(pixels, flipped), None if mask is None else _mirrored(mask, flipped))


def _read(item: Item, placement: Placement, *, wants_alpha: bool) -> _Source:
    with opened(item.path) as file:
        if file.format not in SCALED_BY_DECODER:
            file.load()  # first: a PNG may tell its orientation at its very end
        turn = orientation(file)
        found_wh = _turned(file.size, turn)
        if found_wh != item.size_wh:
            raise DatasetError(
                f"{item.path} is {size_text(found_wh)} now but was {size_text(item.size_wh)} when the run began: start again"
            )
        drafted = None
        if item.subset.resize_interpolation in AVERAGING:  # the others are to see every pixel
            drafted = file.draft(None, _turned(placement.resized_wh, turn))  # None: not a JPEG
        file.load()
        covers_wh = drafted[1][2:] if drafted else file.size
        return _Source(rgb(file), covers_wh, turn, alpha(file) if wants_alpha else None)


def _cut_out(source: _Source, placement: Placement, *, interpolation: str | None) -> np.ndarray:
    """(H, W, 3) uint8, upright. Turning comes last: there are fewer pixels then."""
    (left, top), (width, height) = placement.crop_left_top, placement.bucket_wh
    size_wh = _turned(placement.resized_wh, source.orientation)
    if source.image.size == size_wh:
        return np.asarray(upright(source.image, source.orientation).crop((left, top, left + width, top + height)))
    pixels = resize(source.image, size_wh, interpolation=interpolation, covers_wh=source.covers_wh)
    if source.orientation != 1:
        pixels = np.asarray(upright(Image.fromarray(pixels), source.orientation))
    return pixels[top : top + height, left : left + width]


def _turned(size_wh: Size, exif_orientation: int) -> Size:
    """The upright size of a stored picture, and the stored size of an upright one."""
    return (size_wh[1], size_wh[0]) if exif_orientation in SWAPS_SIDES else size_wh


def _mirrored(values: np.ndarray, flipped: bool) -> np.ndarray:
    """(H, W, ...) -> the same with its columns reversed if ``flipped``; contiguous."""
    return np.ascontiguousarray(values[:, ::-1] if flipped else values)
