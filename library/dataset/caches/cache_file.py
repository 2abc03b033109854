"""One cache file: what it says about how it was made, and whether that is still what a run wants.

A cache file is a safetensors file with this metadata (all strings, JSON where said):

- ``format``: the version of this layout and of the code that makes the content;
- ``ingredients``: JSON, all that the content depends on, readable, so that a mismatch can be named;
- ``fingerprint``: hex digest of format and ingredients; a file whose two disagree is damaged;
- ``sources`` (latents): JSON {"image": {size, mtime_ns}} of the image, and under "mask" of its mask file, as they were. Whether
  they still are what the entry was made from is told by the sha256 in the ingredients alone: files of equal size and time may
  have changed names;
- ``recipe``: digest of the ingredients without what comes from the sources. Training compares it whenever it reads a file that it
  has not made: another run with other settings may have put its own under the name since;
- ``checksum <tensor name>`` of each tensor, compared whenever it is read, and at a start as ``cache_check`` says.

A damaged file is made again. One that is found damaged at the start is mended in that run. Training cannot mend: the encoders
are gone by then, so it deletes the file and ends with a message that names it, and the next start makes it again.

All but the tensors for training is read without torch, so a dry run can tell the state of a cache at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from library.dataset.caches.names import SUFFIX
from library.dataset.image_records import SourceIdentity, unreadable_source
from library.errors import CheckpointError, DatasetError, os_error_text
from library.files.atomic import TEMPORARY_MARK, file_written_atomically
from library.files.left_overs import remove_left_overs
from library.files.safetensors_file import TensorFile, serialize, torch_dtypes

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "3"  # raise it when the layout, or the way from image or caption to the encoder's input, changes
# Words of a checksum's row. Enough for the processor's vector units, and odd, so that a sector or page of a disk that is at
# another's place changes the sums.
ROW_WORDS = 257
WORD_BYTES = 8
CHECKSUM = "checksum "
RECIPE = "recipe"
RECIPE_DIGITS = 16
SOURCES = ("image", "mask")  # ingredients

REASONS = {
    "format": "made by another version of this program",
    "arch": "made for another architecture",
    "model": "model changed",
    "dtype": "dtype changed",
    "bucket": "size changed",
    "resized": "size changed",
    "crop": "size changed",
    "interpolation": "resize interpolation changed",
    "settings": "encoder settings changed",
    "image": "image changed",
    "mask": "mask changed",
}
ABSENT = {"latents_flipped": "has no flipped latents", "mask": "has no mask"}
CHANGED_BYTES = "the bytes of its tensors are not those that were written"
BROKEN_DESCRIPTION = "its description is broken"

Identify = Callable[[Path], SourceIdentity]  # an image file as it is now


class DamagedCacheError(DatasetError):
    """The cache file ``path`` does not hold what was written. A sentence without its end: what follows depends on who reads."""

    def __init__(self, path: str, why: str):
        super().__init__(f"the cache file {path} is damaged ({why})")
        self.path = path


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind`` is "valid", "missing", "stale" or "damaged"; the last two carry a reason."""

    kind: str
    reason: str = ""

    @property
    def valid(self) -> bool:
        return self.kind == "valid"

    @property
    def line(self) -> str:
        return f"damaged: {self.reason}" if self.kind == "damaged" else self.reason


VALID = Verdict("valid")
MISSING = Verdict("missing")


@dataclass(frozen=True, slots=True)
class CacheState:
    """What a run finds in its cache: ``total == valid + missing + len(stale)``.

    Counts images for latents, and different texts per file for text. ``stale`` holds (cache file, reason), damaged ones
    included; ``bytes_needed`` is about what the missing and the stale will take, on disk or (``in_memory``) in each process.
    """

    total: int
    valid: int
    missing: int
    stale: tuple[tuple[Path, str], ...]
    bytes_needed: int
    in_memory: bool = False

    @property
    def is_complete(self) -> bool:
        return self.valid == self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a run expects of one cache file. ``ingredients``, as JSON gives them (no tuples), leaves the hashes of ``sources``
    ({"image": file}) out: those come from the files."""

    ingredients: Mapping[str, object]
    sources: Mapping[str, Path] = field(default_factory=dict)
    tensors: Collection[str] = ()


def fingerprint(ingredients: str) -> str:
    """Hex digest of the format and of the ingredients' JSON."""
    return hashlib.sha256(f"{FORMAT} {ingredients}".encode()).hexdigest()


def recipe_mark(ingredients: Mapping[str, object]) -> str:
    """Hex digest of the format and of the ingredients but for those that differ from image to image: the value of ``RECIPE``."""
    own = {name: value for name, value in ingredients.items() if name not in SOURCES}
    return fingerprint(json.dumps(own, sort_keys=True))[:RECIPE_DIGITS]


def unreadable(path: str | Path, error: Exception) -> Verdict:
    return Verdict("damaged", "truncated" if "truncated" in str(error).replace(str(path), "") else "not a readable cache file")


def check_header(file: TensorFile, wanted: Wanted, *, identify: Identify) -> Verdict:
    """Compares a cache file's header with what a run wants. ``identify`` knows the sha256 of sources that have not changed since
    they were last read; a source of another size than noted is not asked for."""
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        return Verdict("stale", REASONS["format"])
    try:
        stored = json.loads(metadata["ingredients"])
        noted = json.loads(metadata.get("sources", "{}"))
        intact = metadata["fingerprint"] == fingerprint(metadata["ingredients"]) and isinstance(noted, dict)
        intact = intact and metadata[RECIPE] == recipe_mark(stored) and _has_all_tensors(file)
    except (AttributeError, KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        return Verdict("damaged", BROKEN_DESCRIPTION)
    if reason := _first_difference(file, wanted, stored):
        return Verdict("stale", reason)
    for name, path in wanted.sources.items():
        if not _is_same_source(path, noted.get(name), stored.get(name), identify=identify):
            return Verdict("stale", REASONS[name])
    return VALID


def _has_all_tensors(file: TensorFile) -> bool:
    """Whether the tensors are those whose checksums were noted."""
    return {CHECKSUM + name for name in file.names()} == {key for key in file.metadata if key.startswith(CHECKSUM)}


def _first_difference(file: TensorFile, wanted: Wanted, stored: Mapping[str, object]) -> str | None:
    """Of the ingredients and the tensors' names; None where all are as wanted."""
    absent = [name for name in wanted.tensors if name not in file]
    for name, value in wanted.ingredients.items():
        if stored.get(name) != value and name not in absent:
            return REASONS.get(name, f"{name} changed")
    return ABSENT.get(absent[0], "incomplete") if absent else None


def _is_same_source(path: Path, noted: object, sha256: object, *, identify: Identify) -> bool:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable_source(path, error) from error
    return isinstance(noted, dict) and noted.get("size") == size and identify(path).sha256 == sha256


def write_cache_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    ingredients: Mapping[str, object],
    sources: Mapping[str, SourceIdentity] | None = None,
    details: Mapping[str, str] | None = None,
) -> os.stat_result:
    """Writes atomically; equal arguments give equal bytes. ``details`` is metadata beyond the common keys.

    Gives what is known of the file from before it got its name: afterwards the name may be that of another run's file.

    Raises OutputError when the disk is full or the folder cannot be written.
    """
    metadata, sources = dict(details or {}), sources or {}
    hashes = {name: source.sha256 for name, source in sources.items()}
    if sources:
        noted = {name: {"size": source.size, "mtime_ns": source.mtime_ns} for name, source in sources.items()}
        metadata["sources"] = json.dumps(noted, sort_keys=True)
    metadata["format"] = FORMAT
    metadata["ingredients"] = json.dumps({**ingredients, **hashes}, sort_keys=True)
    metadata["fingerprint"] = fingerprint(metadata["ingredients"])
    metadata[RECIPE] = recipe_mark(ingredients)
    for name, tensor in tensors.items():
        metadata[CHECKSUM + name] = checksum(tensor_bytes(tensor))
    data = serialize(tensors, metadata)
    with file_written_atomically(path) as temporary:
        temporary.write_bytes(data)
        return temporary.stat()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(data: bytes | bytearray | memoryview) -> str:
    """CRC-32, as hex digits, of the sums of the columns of a table of 64-bit words, and of the bytes that fill no row.

    Reading waits for it, and it takes a fifth of the time of a CRC-32 of all bytes. What the sums do not see are changes of two
    words or more that cancel each other in a column.
    """
    import numpy as np

    rest = len(data) % (ROW_WORDS * WORD_BYTES)
    value = zlib.crc32(memoryview(data)[len(data) - rest :])
    if rest < len(data):
        words = np.frombuffer(data, "<u8", count=(len(data) - rest) // WORD_BYTES)
        value = zlib.crc32(np.add.reduce(words.reshape(-1, ROW_WORDS), axis=0), value)
    return f"{value:08x}"


def broken_tensors(file: TensorFile, names: Collection[str]) -> dict[str, str]:
    """{name: what is wrong} of those of the file's tensors ``names`` whose bytes do not have the noted checksum."""
    try:
        parts = file.read([file.info(name) for name in names])
        return {name: CHANGED_BYTES for name, part in zip(names, parts, strict=True) if not _is_intact(file, name, part)}
    except OSError as error:
        return dict.fromkeys(names, f"cannot be read ({error.strerror or error})")
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        return dict.fromkeys(names, "truncated" if "truncated" in str(error) else BROKEN_DESCRIPTION)


def _is_intact(file: TensorFile, name: str, data: memoryview) -> bool:
    return checksum(data) == file.note(CHECKSUM + name)


# Of the names of a file's tensors those that are wanted: {name: name in the file}
Pick = Callable[[Collection[str]], Mapping[str, str]]


class CacheEntry:
    """An open cache file and the tensors that were picked from it, which are not read yet. Use with ``with``, or close it.

    ``recipe``: the ``recipe_mark`` that it must have; None takes any file. Raises DamagedCacheError, or another DatasetError when
    the file was removed or replaced since it was checked.
    """

    __slots__ = ("_file", "_picked", "layout", "path")

    def __init__(self, path: str | Path, pick: Pick, *, recipe: str | None = None):
        self.path = str(path)
        with _Reading(self.path):
            self._file = TensorFile(path)
            try:
                if recipe is not None and _recipe_of(self._file) != recipe:
                    raise _replaced(self.path)
                self._picked = {name: (stored, self._file.info(stored)) for name, stored in pick(self._file.names()).items()}
                dtypes = torch_dtypes()
                self.layout = {name: (dtypes[info.dtype], info.shape) for name, (_, info) in self._picked.items()}
            except BaseException:
                self._file.close()
                raise

    def read_into(self, name: str, place: memoryview) -> None:
        """Fills ``place`` with a tensor's bytes and compares their checksum."""
        stored, info = self._picked[name]
        with _Reading(self.path):
            self._file.read_into(info.start, place)
            intact = _is_intact(self._file, stored, place)
        if not intact:
            raise _damaged(self.path, f"the bytes of {stored} are not those that were written")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> CacheEntry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Reading:
    """What goes wrong inside is told as a mistake of the cache file."""

    __slots__ = ("_path",)

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, (CheckpointError, OSError)):
            raise _unusable(self._path, error) from error
        if isinstance(error, (KeyError, TypeError, ValueError)):
            raise _damaged(self._path, BROKEN_DESCRIPTION) from error


def tensors_named(path: str | Path, names: Mapping[str, str]) -> Pick:
    """Picks ``names``, {name: name in the file}; the file must have all."""

    def pick(stored: Collection[str]) -> Mapping[str, str]:
        if missing := [name for name in names.values() if name not in stored]:
            raise DatasetError(f"the cache file {path} lacks {', '.join(missing)}: start again, once without --skip_cache_check")
        return names

    return pick


def _unusable(path: str, error: CheckpointError | OSError) -> DatasetError:
    """A failing disk damages a file; a file that is gone, or may not be read now, may be as it was."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError):
        return _damaged(path, unreadable(path, error).reason)
    why = cause.strerror or str(cause)
    if cause.errno == errno.EIO:
        return _damaged(path, why)
    return DatasetError(f"cannot read the cache file {path} ({why}): start again, and if it is gone it will be made anew")


def _recipe_of(file: TensorFile) -> str | None:
    """None where another version of this program made the file."""
    try:
        return file.note(RECIPE)
    except KeyError:
        return None


def _replaced(path: str) -> DatasetError:
    return DatasetError(
        f"the cache file {path} was replaced by another run with other settings (model, precision or sizes): give each run a "
        "--cache_dir of its own, or the same settings, and start again"
    )


def _damaged(path: str, why: str) -> DamagedCacheError:
    return DamagedCacheError(path, why)


def clean_left_overs(folders: Iterable[Path]) -> int:
    """Removes temporary cache files that killed runs left in ``folders``; says how many."""
    return remove_left_overs(folders, f"*{SUFFIX}{TEMPORARY_MARK}*")


def make_folder(folder: Path) -> None:
    """Creates a cache folder. Raises DatasetError naming it when that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"cannot create the cache folder {folder}: {os_error_text(error)}") from error
