"""Image files: is one readable and how large is it, and its pixels as the model will see them.

Everything happens on the upright picture: EXIF orientation is applied first (the reference ignores it).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from library.dataset.items import Item
from library.errors import DatasetError

ORIENTATION_TAG = 0x0112  # EXIF 2.3, table 4
UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)
SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow before 11 opens 16-bit PNG as "I"

MIN_SIDE_PX = 16  # one image token of the models here; less is an icon or a tracking pixel, never training material
MAX_SIDE_PX = 32_767  # longer than any photograph, scan or comic strip: a mistake, of which a crop would keep next to nothing
MAX_PIXELS = 178_956_970  # where Pillow refuses to open a file (twice its decompression-bomb warning)

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
        raise DatasetError(f"{item.path} is {_by(found_wh)} now but was {_by(item.size_wh)} when the run began: start again")
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
        raise DatasetError(f"{path} cannot be read: {_reason(error, path)}") from error


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright picture, after reading the whole file so that a truncated one is found.

    Raises DatasetError naming the file and why it cannot be trained.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            _check_size(width, height)
            image.draft(image.mode, (1, 1))  # JPEG: reads every byte, but builds a picture of an eighth of the size
            image.load()
            swapped = _orientation(image) in SWAPS_SIDES
    except DatasetError as error:
        raise DatasetError(f"{path} {error.problems[0]}") from None
    except Exception as error:  # Pillow's readers raise anything at all on damaged data
        raise DatasetError(f"{path} cannot be read: {_reason(error, path)}") from error
    return (height, width) if swapped else (width, height)


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
    method = UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block does not make the picture unusable: viewers ignore it too
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Alpha is dropped, not blended: the colours under transparent pixels count, as in the reference."""
    if image.mode in SIXTEEN_BIT_GREY:
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.mode == "P":
        image.info.pop("transparency", None)  # only makes Pillow warn; RGB drops it
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE_PX:
        raise DatasetError(f"is too small ({_by((width, height))}): both sides need at least {MIN_SIDE_PX} px")
    if max(width, height) > MAX_SIDE_PX:
        raise DatasetError(f"is too large ({_by((width, height))}): no side may be over {MAX_SIDE_PX:,} px; scale it down")
    if width * height > MAX_PIXELS:
        raise DatasetError(f"is too large ({_by((width, height))}): at most {MAX_PIXELS:,} pixels; scale it down")


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    if isinstance(error, Image.DecompressionBombError):
        return f"it is too large (over {MAX_PIXELS:,} pixels); scale it down"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is no image that Pillow knows"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) or type(error).__name__


def _by(size_wh: tuple[int, int]) -> str:
    return f"{size_wh[0]}x{size_wh[1]}"
