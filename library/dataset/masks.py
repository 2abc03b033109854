"""Loss masks: where in a picture the loss counts, on the grid of its latents.

A mask is resized and cropped exactly as its image is (kohya-ss/sd-scripts squeezes it into the bucket, so that it no longer
lies over what it marks).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from library.dataset.buckets import Placement, Size
from library.dataset.picture_file import loaded_upright, opened, red
from library.dataset.resizing import resize
from library.dataset.verify import size_text
from library.errors import DatasetError

LATENT_PX = 8  # sides of the square of pixels that one latent stands for


def read_mask(path: Path, *, image: Path, size_wh: Size) -> Image.Image:
    """The red channel of a mask image, upright: mode L, white where the loss counts.

    Raises DatasetError naming the file when it cannot be read, and naming both when it has not the ``size_wh`` of ``image``.
    """
    with opened(path) as file:
        mask = red(loaded_upright(file))
    if mask.size != size_wh:
        raise DatasetError(
            f"the mask {path} is {size_text(mask.size)}, but its image {image} is {size_text(size_wh)}: "
            "a mask needs the size of its image, so that it is clear what it covers"
        )
    return mask


def on_latent_grid(mask: Image.Image | None, placement: Placement) -> np.ndarray:
    """A mask of the whole image -> (h, w) float32 in [0, 1] of its crop: each value is the mean of LATENT_PX x LATENT_PX pixels.

    Without a mask everything counts.
    """
    width, height = (side // LATENT_PX for side in placement.bucket_wh)
    if mask is None:
        return np.ones((height, width), np.float32)
    blocks = _cropped(mask, placement).reshape(height, LATENT_PX, width, LATENT_PX)
    # whole numbers below 2**24, so the order of adding does not matter
    return blocks.sum(axis=(1, 3), dtype=np.float32) / np.float32(255 * LATENT_PX**2)  # (h, w)


def _cropped(mask: Image.Image, placement: Placement) -> np.ndarray:
    """(H, W) uint8"""
    goal_wh = placement.resized_wh
    shrinks = goal_wh[0] <= mask.width and goal_wh[1] <= mask.height
    resized = resize(mask, goal_wh, interpolation="area" if shrinks else "linear")
    (left, top), (width, height) = placement.crop_left_top, placement.bucket_wh
    return resized[top : top + height, left : left + width]
