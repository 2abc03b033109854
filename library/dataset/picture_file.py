"""A picture file opened with Pillow: which way up it is, and what its channels mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from library.dataset.picture_formats import picture_formats
from library.dataset.verify import ALPHA_MODES, orientation, reason
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


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file, its pixels not read yet. Whatever goes wrong until it is closed becomes a DatasetError that names it."""
    try:
        with Image.open(path, formats=picture_formats()) as image:
            yield image
    except DatasetError:
        raise
    except Exception as error:  # Pillow's readers raise anything at all on damaged data
        raise DatasetError(f"{path} cannot be read: {reason(error, path)}") from error


def upright(image: Image.Image, exif_orientation: int) -> Image.Image:
    method = UPRIGHT.get(exif_orientation)
    return image if method is None else image.transpose(method)


def loaded_upright(image: Image.Image) -> Image.Image:
    """The whole picture, its first frame where there are several."""
    image.load()  # first: a PNG may tell its orientation at its very end
    return upright(image, orientation(image))


def rgb(image: Image.Image) -> Image.Image:
    """Alpha is dropped, not blended: the colours under transparent pixels count, as in kohya-ss/sd-scripts."""
    if image.mode == "RGB":
        return image  # convert() would copy it
    if image.mode in SIXTEEN_BIT_GREY:
        image = _eight_bit(image)
    if image.mode == "P":
        image = image.copy()
        image.info.pop("transparency", None)  # only makes Pillow warn
    return image.convert("RGB")


def red(image: Image.Image) -> Image.Image:
    """The red channel, which is the grey of a grey picture: 8 bit, mode L."""
    return _eight_bit(image) if image.mode in SIXTEEN_BIT_GREY else rgb(image).getchannel("R")


def alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, 8 bit, mode L; None where the picture has no transparency of any kind."""
    if image.mode in ALPHA_MODES:
        return image.getchannel(len(image.getbands()) - 1)
    key = image.info.get("transparency")
    if key is None:
        return None
    if image.mode in SIXTEEN_BIT_GREY:  # Pillow looks for the transparent grey among eight bits
        return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _eight_bit(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
    return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
