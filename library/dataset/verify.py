"""Is an image file readable to its end, and what is in it. Each file's bytes are read once: for its hash and for decoding."""

from __future__ import annotations

import errno
import hashlib
import os
import stat as stat_modes
import time
import warnings as python_warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from library.dataset.image_records import ImageRecord, ImageRecords, Size
from library.dataset.picture_formats import picture_formats
from library.errors import DatasetError
from library.files.stamps import stamp

ORIENTATION_TAG = 0x0112  # EXIF 2.3, table 4
SWAPS_SIDES = (5, 6, 7, 8)  # orientations whose picture is stored lying on its side
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
RED_FIRST = ("RGB", "RGBA", "L", "LA")  # modes whose first channel is the red, or the grey, in 8 bit

MIN_SIDE_PX = 16  # one image token of the models here; less is an icon or a tracking pixel, never training material
MAX_SIDE_PX = 32_767  # longer than any photograph, scan or comic strip: a mistake, of which a crop would keep next to nothing
MAX_PIXELS = 178_956_970  # where Pillow refuses to open a file (twice its decompression-bomb warning)
MAX_BYTES = 2**31  # MAX_PIXELS take less in every format, even stored plainly with 16 bits for each of four channels


LOOKED_UP_AT_ONCE = 256  # files whose time a thread compares before it reports back
READ_AT_ONCE = 8
SAVED_EVERY_S = 60.0  # a long check that is killed does not start all over

Progress = Callable[[int, int], None]  # (images read, images to read)


def verify_images(
    paths: Iterable[str],
    records: ImageRecords,
    *,
    lookers: ThreadPoolExecutor,
    readers: ThreadPoolExecutor,
    progress: Progress | None = None,
) -> dict[str, ImageRecord | str]:
    """By path: what each file holds, or the sentence that says what is wrong with it.

    Files that are as they were when ``records`` were made are not read; all others are, once, and go into the records.
    ``lookers`` compare times, which is waiting for the disk; ``readers`` decode, which takes a core and memory each.
    """
    unique = list(dict.fromkeys(paths))
    results: dict[str, ImageRecord | str] = {}
    unread: list[str] = []
    look_up = in_chunks(lambda path: _unchanged(path, records), unique, lookers, size=LOOKED_UP_AT_ONCE)
    for path, record in zip(unique, look_up, strict=True):
        if record is None:
            unread.append(path)
        else:
            results[path] = record
    results.update(_read_all(unread, records, pool=readers, progress=progress))
    return results


def in_chunks(work: Callable[[Any], Any], values: Sequence[Any], pool: ThreadPoolExecutor, *, size: int) -> Iterator[Any]:
    """``pool.map``, but each thread takes ``size`` values at once: handing them over one by one takes longer than small work."""
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    for results in pool.map(lambda chunk: [work(value) for value in chunk], chunks):
        yield from results


def read_record(path: Path, known: ImageRecord | None = None) -> ImageRecord:
    """Reads the whole file, so that a truncated one is found, and tells what it holds.

    ``known``: of an earlier reading; where the bytes are still the same they are not decoded again. Raises DatasetError naming
    the file and why it cannot be trained.
    """
    try:
        stat, data = _read(path)
        sha256 = hashlib.sha256(data).digest()
        if known is not None and known.sha256 == sha256:
            return known._replace(mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns)
        found = _decode(data)
    except DatasetError as error:
        raise DatasetError(f"{path} {error.problems[0]}") from None
    except Exception as error:  # Pillow's readers raise anything at all on damaged data
        raise DatasetError(f"{path} cannot be read: {reason(error, path)}") from error
    return ImageRecord(*stamp(stat), sha256, found.size_wh, found.has_alpha, found.is_transparent, found.is_black)


def orientation(image: Image.Image) -> int:
    """1 to 8, how the picture must be turned to be upright; 1 where EXIF does not say."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block does not make the picture unusable: viewers ignore it too
        return 1


def reason(error: Exception, path: Path) -> str:
    """Why an image could not be read, in words for the user."""
    if isinstance(error, FileNotFoundError):
        return "it is a link to a file that is not there" if path.is_symlink() else "the file is not there"
    if isinstance(error, Image.DecompressionBombError):
        return f"it is too large (over {MAX_PIXELS:,} pixels); scale it down"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a link that leads back to itself"
    if path.is_dir():
        return "it is a folder"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is no image that Pillow knows"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) or type(error).__name__


def _unchanged(path: str, records: ImageRecords) -> ImageRecord | None:
    record = records.get(path)
    try:
        return record if record is not None and record.fits(os.stat(path)) else None  # noqa: PTH116  # of very many files
    except OSError:
        return None


def _read_all(
    paths: Sequence[str], records: ImageRecords, *, pool: ThreadPoolExecutor, progress: Progress | None
) -> Iterator[tuple[str, ImageRecord | str]]:
    saved = time.monotonic()
    with python_warnings.catch_warnings():
        python_warnings.filterwarnings("ignore", module=r"PIL\.")  # large or with odd EXIF: fine, or refused with a reason
        read = in_chunks(lambda path: _record_or_problem(path, records), paths, pool, size=READ_AT_ONCE)
        for number, (path, result) in enumerate(zip(paths, read, strict=True), start=1):
            yield path, result if isinstance(result, str) else records.put(path, result)
            if progress is not None:
                progress(number, len(paths))
            if time.monotonic() - saved > SAVED_EVERY_S:
                records.save()
                saved = time.monotonic()


def _record_or_problem(path: str, records: ImageRecords) -> ImageRecord | str:
    try:
        return read_record(Path(path), records.get(path))
    except DatasetError as error:
        return str(error)


def size_text(size_wh: Size) -> str:
    return f"{size_wh[0]}x{size_wh[1]}"


def _read(path: Path) -> tuple[os.stat_result, bytes]:
    stat = path.stat()  # before reading: whatever changes the file from now on gives it another time
    if stat_modes.S_ISDIR(stat.st_mode):
        raise DatasetError("cannot be read: it is a folder")
    if not stat_modes.S_ISREG(stat.st_mode):  # opening a pipe would wait for ever
        raise DatasetError("cannot be read: it is no file but a pipe or a device")
    if stat.st_size > MAX_BYTES:
        raise DatasetError(f"is too large ({stat.st_size:,} bytes): no image of at most {MAX_PIXELS:,} pixels takes as much")
    data = path.read_bytes()
    if len(data) != stat.st_size:
        raise DatasetError("cannot be read: it is being written to; start again when that is done")
    return stat, data


class _Content(NamedTuple):
    """As in ``ImageRecord``."""

    size_wh: Size
    has_alpha: bool
    is_transparent: bool
    is_black: bool


def _decode(data: bytes) -> _Content:
    with Image.open(BytesIO(data), formats=picture_formats()) as image:
        width, height = image.size
        _check_size(width, height)
        image.draft(image.mode, (1, 1))  # JPEG: reads every byte, but builds a picture of an eighth of the size
        image.load()
        has_alpha = image.mode in ALPHA_MODES or "transparency" in image.info
        size_wh = (height, width) if orientation(image) in SWAPS_SIDES else (width, height)
        return _Content(size_wh, has_alpha, has_alpha and _is_transparent(image), _is_black(image))


def _is_transparent(image: Image.Image) -> bool:
    """Whether an image with an alpha channel is transparent everywhere."""
    from library.dataset.picture_file import alpha  # which imports this module, and numpy

    if image.mode in ALPHA_MODES and _middle(image)[-1] > 0:
        return False
    opacity = alpha(image)
    return opacity is not None and _is_zero(opacity)


def _is_black(image: Image.Image) -> bool:
    """Whether a mask of it would count nowhere."""
    from library.dataset.picture_file import red

    if image.mode in RED_FIRST and _middle(image)[0] > 0:
        return False
    return _is_zero(red(image))


def _middle(image: Image.Image) -> tuple[int, ...]:
    """The channels of the pixel in the middle: it nearly always spares a look at the others."""
    value: Any = image.getpixel((image.width // 2, image.height // 2))
    return value if isinstance(value, tuple) else (value,)


def _is_zero(channel: Image.Image) -> bool:
    """``channel``: mode L."""
    return channel.getextrema() == (0, 0)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE_PX:
        raise DatasetError(f"is too small ({size_text((width, height))}): both sides need at least {MIN_SIDE_PX} px")
    if max(width, height) > MAX_SIDE_PX:
        raise DatasetError(f"is too large ({size_text((width, height))}): no side may be over {MAX_SIDE_PX:,} px; scale it down")
    if width * height > MAX_PIXELS:
        raise DatasetError(f"is too large ({size_text((width, height))}): at most {MAX_PIXELS:,} pixels; scale it down")
