"""Caches that kohya-ss/sd-scripts wrote: ``.npz`` files beside the images, read without pickle and taken over where they fit.

Latents lie in ``STEM_WxH_<architecture>.npz`` (STEM: the image's path without its ending, WxH: its size), text in one file per
image. Such a file does not say all that it was made from, so what can be known is compared with the item (size, crop, mirrored
latents, the image's age and rotation, the text's tokens); that model, resizing filter and bucket settings are those of this run
is the user's word.

What a file means is the architecture's knowledge (:class:`ReferenceFormat`); nothing here imports torch at module level.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from library.dataset.folders import image_extensions
from library.dataset.items import Item
from library.dataset.picture_formats import picture_formats
from library.dataset.verify import orientation

if TYPE_CHECKING:
    from torch import Tensor

    from library.dataset.caches.latent_cache import LatentRecipe
    from library.dataset.caches.text_cache import TextRecipe

Arrays = Mapping[str, np.ndarray]  # each is read from the file when it is asked for

NOTHING = ""  # no file: nothing was expected, nothing need be told
NAMESAKE = "of images beside another one of the same base name"
MOST_BYTES = 64 << 20  # of one array once it is unpacked: sixteen times the text of the largest encoder
LATENTS, FLIPPED = "latents", "latents_flipped"
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, MemoryError)
UNREADABLE = (OSError, ValueError, KeyError, *ARCHIVE_ERRORS)


class MisfitError(Exception):
    """A file that is not taken over. The text says why, to be read after a count of files ("3 older than the image"), without
    names and numbers, so that equal reasons can be counted."""


class ReferenceFormat(Protocol):
    """What an architecture's files are called and what their arrays mean. Numpy only."""

    latents_ending: str  # of "STEM_WxH_anima.npz": "_anima.npz"
    text_ending: str  # of "STEM_anima_te.npz": "_anima_te.npz"
    has_sizes: bool  # one file holds latents of several sizes: its keys end in "_{h}x{w}"

    def scaled_latents(self, stored: np.ndarray) -> np.ndarray:
        """The array of the file -> (C, h, w) as ``encode_images`` of the trainer gives it. Its shape is checked by the caller."""

    def conditioning(self, arrays: Arrays, text: str) -> dict[str, np.ndarray]:
        """What ``Conditioning.cache_tensors`` of ``text`` would be. Raises MisfitError, or KeyError where an array is missing."""


def reference_latents(
    item: Item, names: tuple[str, ...], *, format: ReferenceFormat, recipe: LatentRecipe
) -> dict[str, Tensor] | str:
    """The tensors ``names`` ("latents", "latents_flipped") for the item's cache entry, or why there are none ('': no file)."""
    path = _latents_path(item, format.latents_ending)
    if path is None:
        return NOTHING
    if has_namesake(item.path):
        return NAMESAKE
    width, height = item.bucket_wh
    size = (height // recipe.shrink, width // recipe.shrink)
    try:
        check_image(item, path)
        arrays = _latent_arrays(path, f"_{size[0]}x{size[1]}" if format.has_sizes else "", item, flip=FLIPPED in names)
        found = {name: format.scaled_latents(array) for name, array in arrays.items()}
        if any(array.shape != (recipe.channels, *size) for array in found.values()):
            raise MisfitError("with latents of another size than the image trains at")
        return _tensors(found, recipe.dtype)
    except MisfitError as error:
        return str(error)
    except OSError:
        return "of images that cannot be read any more"


def reference_text(item: Item, text: str, *, format: ReferenceFormat, recipe: TextRecipe) -> dict[str, Tensor] | str:
    """The tensors of the item's ``text``, or why there are none ('': no file)."""
    path = item.path.with_name(item.path.stem + format.text_ending)
    if not path.is_file():
        return NOTHING
    if has_namesake(item.path):
        return NAMESAKE
    try:
        with _opened(path) as arrays:
            found = format.conditioning(arrays, text)
        return _tensors(found, recipe.dtype)
    except KeyError:
        return "that lack an array"
    except UNREADABLE:
        return "that cannot be read"
    except MisfitError as error:
        return str(error)


def check_image(item: Item, path: Path) -> None:
    """Raises MisfitError where the latents cannot be those of this image as this run resizes and crops it."""
    if item.path.stat().st_mtime_ns > path.stat().st_mtime_ns:
        raise MisfitError("older than the image")
    if is_turned(item.path):
        raise MisfitError("of images that EXIF data turn, which kohya-ss/sd-scripts ignores")
    if item.subset.resize_interpolation is not None:
        raise MisfitError("of images with resize_interpolation set, since they do not say how they were resized")
    centred = tuple((side - kept) // 2 for side, kept in zip(item.resized_wh, item.bucket_wh, strict=True))
    if item.crop_left_top != centred:
        raise MisfitError("of images that are not cropped at their centre")


def is_turned(path: Path) -> bool:
    """Whether EXIF data say that the picture is to be turned or mirrored."""
    with (
        suppress(Exception),
        Image.open(path, formats=picture_formats()) as image,
    ):  # Pillow raises anything at all on damaged EXIF data
        return orientation(image) in range(2, 9)
    return False


def has_namesake(path: Path) -> bool:
    """Whether another picture beside it differs by the ending alone: the files of both would have one name."""
    endings = {form(ending) for ending in image_extensions() for form in (str.lower, str.upper)} - {path.suffix}
    return any(path.with_suffix(ending).is_file() for ending in endings)


def _latents_path(item: Item, ending: str) -> Path | None:
    """The file of the image's size; of its size before it is turned upright, so that the reason can be told."""
    for width, height in (item.size_wh, item.size_wh[::-1]):
        path = item.path.with_name(f"{item.path.stem}_{width:04d}x{height:04d}{ending}")
        if path.is_file():
            return path
    return None


def _latent_arrays(path: Path, key_ending: str, item: Item, *, flip: bool) -> dict[str, np.ndarray]:
    try:
        with _opened(path) as arrays:
            if LATENTS + key_ending not in arrays:
                raise MisfitError("without latents of the size that the image trains at")
            if not np.array_equal(arrays[f"original_size{key_ending}"], item.size_wh):
                raise MisfitError("made from an image of another size")
            if flip and FLIPPED + key_ending not in arrays:
                raise MisfitError("without flipped latents")
            found = {name: arrays[name + key_ending] for name in ((LATENTS, FLIPPED) if flip else (LATENTS,))}
    except UNREADABLE as error:
        raise MisfitError("that cannot be read") from error
    if any(array.dtype.kind != "f" for array in found.values()):
        raise MisfitError("without numbers")
    return found


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    """Raises one of UNREADABLE, also where the file holds pickled objects or is no archive."""
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is a single array")
    if any(member.file_size > MOST_BYTES for member in loaded.zip.infolist()):  # type: ignore[union-attr]
        loaded.close()
        raise ValueError(f"{path} holds an array of more than {MOST_BYTES} bytes")
    return loaded


def _tensors(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, Tensor]:
    """Numbers in ``dtype``, ids as they are. Raises MisfitError for what is not finite in it."""
    import torch

    tensors = {}
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf":
            raise MisfitError("without numbers")
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        tensors[name] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        if not bool(torch.isfinite(tensors[name]).all()):
            raise MisfitError("with values that are not finite")
    return tensors
