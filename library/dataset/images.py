"""Image files: their pixels as the model will see them.

Everything happens on the upright picture: EXIF orientation is applied first (the reference ignores it).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from library.dataset.items import Item
from library.dataset.verify import orientation, reason, size_text
from library.errors import DatasetError

UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow before 11 opens 16-bit PNG as "I"

PILLOW_RESIZERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
OPENCV_RESIZERS = {
    "nearest": "INTER_NEAREST_EXACT",
    "bilinear": "INTER_LINEAR",
    "linear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "cubic": "INTER_CUBIC",
    "area": "INTER_AREA",
}


def load_pixels(item: Item, *, flipped: bool = False) -> np.ndarray:
    """The image resized to cover its bucket, cropped to it and mirrored if ``flipped``: (H, W, 3) uint8, RGB, contiguous.

    Raises DatasetError naming the file when it cannot be read any more or has changed its size since the scan.
    """
    pixels = read_rgb(item.path)
    found_wh = (pixels.shape[1], pixels.shape[0])
    if found_wh != item.size_wh:
        raise DatasetError(
            f"{item.path} is {size_text(found_wh)} now but was {size_text(item.size_wh)} when the run began: start again"
        )
    pixels = resize(pixels, item.resized_wh, interpolation=item.subset.resize_interpolation)
    (left, top), (width, height) = item.crop_left_top, item.bucket_wh
    pixels = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels)


def read_rgb(path: Path) -> np.ndarray:
    """The upright picture (first frame of an animation) as (H, W, 3) uint8 RGB. Raises DatasetError naming the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return np.asarray(_to_rgb(_upright(image)))
    except Exception as error:  # Pillow's readers raise anything at all on damaged data
        raise DatasetError(f"{path} cannot be read: {reason(error, path)}") from error


def resize(pixels: np.ndarray, size_wh: tuple[int, int], *, interpolation: str | None) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8.

    Without an explicit ``interpolation``: area averaging when neither side grows, Lanczos otherwise.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size_wh:
        return pixels
    if interpolation is None:
        interpolation = "area" if size_wh[0] <= width and size_wh[1] <= height else "lanczos"
    if interpolation in PILLOW_RESIZERS:
        return np.asarray(Image.fromarray(pixels).resize(size_wh, PILLOW_RESIZERS[interpolation]))
    import cv2

    return cv2.resize(pixels, size_wh, interpolation=getattr(cv2, OPENCV_RESIZERS[interpolation]))


def _upright(image: Image.Image) -> Image.Image:
    method = UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Alpha is dropped, not blended: the colours under transparent pixels count, as in the reference."""
    if image.mode in SIXTEEN_BIT_GREY:
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.mode == "P":
        image.info.pop("transparency", None)  # only makes Pillow warn; RGB drops it
    return image.convert("RGB")
