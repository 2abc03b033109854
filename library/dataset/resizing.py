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
AVERAGING = (None, "area")  # the mean of means is nearly the mean of all: these may shrink a picture in two steps


def resize(
    image: Image.Image, size_wh: Size, *, interpolation: str | None, covers_wh: tuple[float, float] | None = None
) -> np.ndarray:
    """An image of mode RGB or L -> (height, width, 3) or (height, width) uint8.

    Without an explicit ``interpolation``: area averaging when neither side grows, Lanczos otherwise. ``covers_wh``, in pixels of
    ``image``: how much of it is picture, where a decoder shrank it and the last row or column stands for a part of a pixel only.
    """
    if image.size == size_wh:
        return np.asarray(image)
    shrinks = size_wh[0] <= image.width and size_wh[1] <= image.height
    if interpolation is None:
        interpolation = "area" if shrinks else "lanczos"
    if interpolation in PILLOW_RESIZERS:
        return np.asarray(image.resize(size_wh, PILLOW_RESIZERS[interpolation]))
    if shrinks and interpolation == "area":
        image, covers_wh = halved(image, size_wh, covers_wh=covers_wh or image.size)
        return averaged(np.asarray(image), size_wh, covers_wh=covers_wh)
    import cv2

    return cv2.resize(np.asarray(image), size_wh, interpolation=getattr(cv2, OPENCV_RESIZERS[interpolation]))


def halved(image: Image.Image, goal_wh: Size, *, covers_wh: tuple[float, float]) -> tuple[Image.Image, tuple[float, float]]:
    """The image shrunk by the largest power of two that leaves both sides at least as long as ``goal_wh``, and what it covers.

    It is the rule by which a JPEG decoder shrinks, so that all formats come out alike, and it costs a quarter of what averaging
    over odd windows does.
    """
    times = min(int(covers_wh[0] // goal_wh[0]), int(covers_wh[1] // goal_wh[1]))
    if times < 2:
        return image, covers_wh
    factor = 1 << (times.bit_length() - 1)
    return image.reduce(factor), (covers_wh[0] / factor, covers_wh[1] / factor)


def averaged(pixels: np.ndarray, size_wh: Size, *, covers_wh: tuple[float, float]) -> np.ndarray:
    """(H, W, ...) uint8 -> (height, width, ...): each pixel the mean of the area it covers. Neither side may grow.

    The result is that of OpenCV's INTER_AREA to one level. Down to half the size it is made by enlarging to twice the goal and
    halving, both of which OpenCV does with vector instructions: half the time of its direct way. The enlarged pixels are narrower
    than the given ones, so that each is a mean of two neighbours at most, and two of them cover exactly one of the result.
    """
    import cv2

    width, height = size_wh
    across, down = width / covers_wh[0], height / covers_wh[1]
    if min(across, down) >= 0.5:
        # A hair less than the factor: where edges of both grids meet, rounding would make OpenCV take the wrong neighbour.
        twice = 2 - 1e-9
        doubled = cv2.resize(pixels, None, fx=twice * across, fy=twice * down, interpolation=cv2.INTER_AREA)
        return cv2.resize(doubled[: 2 * height, : 2 * width], size_wh, interpolation=cv2.INTER_AREA)
    return cv2.resize(pixels, None, fx=across, fy=down, interpolation=cv2.INTER_AREA)[:height, :width]
