"""Changing the size of pictures, in the ways that kohya-ss/sd-scripts names, so that a dataset trains on the same pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from library.dataset.buckets import Size

PILLOW_RESIZERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
OPENCV_RESIZERS = {
    "nearest": "INTER_NEAREST_EXACT",
    "bilinear": "INTER_LINEAR",
    "linear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "cubic": "INTER_CUBIC",
    "area": "INTER_AREA",
}
AVERAGING = (None, "area", "box")  # a mean of means is nearly the mean of all: these may shrink a picture in two steps


def resize(image: Image.Image, size_wh: Size, *, interpolation: str | None) -> np.ndarray:
    """An image of mode RGB or L -> (height, width, 3) or (height, width) uint8.

    Without an explicit ``interpolation``: area averaging when neither side grows, Lanczos otherwise.
    """
    if image.size == size_wh:
        return np.asarray(image)
    shrinks = size_wh[0] <= image.width and size_wh[1] <= image.height
    if interpolation is None:
        interpolation = "area" if shrinks else "lanczos"
    if interpolation in PILLOW_RESIZERS:
        return np.asarray(image.resize(size_wh, PILLOW_RESIZERS[interpolation]))
    import cv2

    pixels = np.asarray(image)
    if interpolation == "area" and shrinks:
        return averaged(pixels, size_wh)
    return cv2.resize(pixels, size_wh, interpolation=getattr(cv2, OPENCV_RESIZERS[interpolation]))


def halved(image: Image.Image, goal_wh: Size, *, covers_wh: tuple[float, float] | None = None) -> Image.Image:
    """Shrunk by the largest power of two that leaves both sides at least as long as ``goal_wh``; the image itself where it
    is to grow.

    It is the rule by which a JPEG decoder shrinks, so that all formats come out alike, and it costs a quarter of what averaging
    over odd windows does. ``covers_wh``: how much of it is picture, where a decoder left a last row or column that stands for a
    part of a pixel only.
    """
    covers_wh = covers_wh or image.size
    times = min(image.width // goal_wh[0], image.height // goal_wh[1])
    if times >= 2:
        factor = 1 << (times.bit_length() - 1)
        image = image.reduce(factor)
        covers_wh = (covers_wh[0] / factor, covers_wh[1] / factor)
    # Rounded: half a pixel too much or too little is taken for picture, at most. Never too little for the goal.
    kept_wh = (int(covers_wh[0] + 0.5), int(covers_wh[1] + 0.5))
    return image if kept_wh == image.size else image.crop((0, 0, *kept_wh))


def averaged(pixels: np.ndarray, size_wh: Size) -> np.ndarray:
    """(H, W, ...) uint8 -> (height, width, ...): each pixel the mean of the area it covers. Neither side may grow.

    The result is that of OpenCV's INTER_AREA to one level. Down to half the size it is made by enlarging to twice the goal and
    halving, both of which OpenCV does with vector instructions: half the time of its direct way. The enlarged pixels are narrower
    than the given ones, so that each is a mean of two neighbours at most, and two of them cover exactly one of the result.
    """
    import cv2

    height, width = pixels.shape[:2]
    across, down = 2 * size_wh[0] / width, 2 * size_wh[1] / height
    if across >= 1 and down >= 1:
        # A hair less than the factor: where edges of both grids meet, rounding would make OpenCV take the wrong neighbour.
        hair = 1 - 1e-9
        pixels = cv2.resize(pixels, None, fx=across * hair, fy=down * hair, interpolation=cv2.INTER_AREA)
    return cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA)
