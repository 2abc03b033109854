"""One cache file: its name, what it says about how it was made, and whether that is still what a run wants.

A cache file is a safetensors file with this metadata (all strings, JSON where said):

- ``format``: the version of this layout and of the code that makes the content;
- ``fingerprint``: hex digest of format and ingredients; a file whose two disagree is damaged;
- ``ingredients``: JSON, all that the content depends on, readable, so that a mismatch can be named;
- ``source`` (latents): JSON {size, mtime_ns} of the image. While both are unchanged the image is trusted to be the one whose
  sha256 stands in the ingredients; otherwise it is hashed again, and equal content stays valid;
- ``crc32``: JSON {tensor name: checksum}, compared whenever a tensor is read, and at a start as ``cache_check`` says.

A damaged file is made again. One that is found damaged at the start is mended in that run. Training cannot mend: the encoders
are gone by then, so it deletes the file and ends with a message that names it, and the next start makes it again.

All but the tensors for training is read without torch, so a dry run can tell the state of a cache at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset.image_records import SourceHashes, SourceIdentity, folder_mark, unreadable_source
from library.errors import CheckpointError, DatasetError, OutputError, os_error_text
from library.files.atomic import TEMPORARY_MARK, write_atomically
from library.files.left_overs import remove_left_overs
from library.files.safetensors_file import SafetensorsHeader, read_header, read_tensors, save_safetensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "1"  # raise it when the layout, or the way from image or caption to the encoder's input, changes
SUFFIX = ".safetensors"
MAX_NAME_BYTES = 230  # file systems allow 255; the rest is for the temporary name's ".tmp-PID"

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
}


class DamagedCacheError(DatasetError):
    """A cache file does not hold what was written. A sentence without its end: what follows depends on who reads."""


FindBroken = Callable[[SafetensorsHeader, Collection[str]], Mapping[str, str]]  # of these tensors, those damaged, and how


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind`` is "valid", "missing", "stale" or "damaged"; the last two carry a reason.

    ``touched``: valid, but the image's time is another than noted, so that it had to be hashed.
    """

    kind: str
    reason: str = ""
    touched: bool = False

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
    """What a run expects of one cache file. ``ingredients`` leaves the image's hash out: that comes from ``source``."""

    ingredients: Mapping[str, object]
    source: Path | None = None
    tensors: Collection[str] = ()


def cache_path(beside: Path, kind: str, cache_dir: Path | None) -> Path:
    """Where the cache of kind ``kind`` ("512x512.anima-latents") of the image ``beside`` lies.

    Under ``cache_dir`` a hash of the image's folder leads the name, so that equal names of two folders stay apart.
    """
    name = _short_enough(beside.name, f".{kind}{SUFFIX}")
    if cache_dir is None:
        return beside.with_name(name)
    return cache_dir / f"{folder_mark(beside.parent)}-{name}"


def _short_enough(name: str, ending: str) -> str:
    encoded = os.fsencode(name)
    room = MAX_NAME_BYTES - len(ending)
    if len(encoded) <= room:
        return name + ending
    mark = "~" + hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[: room - len(mark)].decode("utf-8", "ignore") + mark + ending


def fingerprint(ingredients: Mapping[str, object]) -> str:
    """Hex digest of the format and of every ingredient."""
    text = json.dumps([FORMAT, ingredients], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check(path: Path, wanted: Wanted, *, hashes: SourceHashes | None = None, broken: FindBroken | None = None) -> Verdict:
    """Compares a cache file's header with what a run wants; reads the image only when it may have changed, and its tensors
    only through ``broken``."""
    if not path.is_file():
        return MISSING
    try:
        header = read_header(path)
    except CheckpointError as error:
        return unreadable(path, error)
    verdict = check_header(header, wanted, hashes=hashes or SourceHashes())
    found = broken(header, wanted.tensors) if broken is not None and verdict.valid else {}
    return Verdict("damaged", next(iter(found.values()))) if found else verdict


def unreadable(path: Path, error: Exception) -> Verdict:
    return Verdict("damaged", "truncated" if "truncated" in str(error).replace(str(path), "") else "not a readable cache file")


def check_header(header: SafetensorsHeader, wanted: Wanted, *, hashes: SourceHashes) -> Verdict:
    if header.metadata.get("format") != FORMAT:
        return Verdict("stale", REASONS["format"])
    try:
        stored = json.loads(header.metadata["ingredients"])
        source = json.loads(header.metadata.get("source", "null"))
        intact = header.metadata["fingerprint"] == fingerprint(stored)
    except (KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        return Verdict("damaged", "its description is broken")
    for name, value in plain(wanted.ingredients).items():
        if stored.get(name) != value:
            return Verdict("stale", REASONS.get(name, f"{name} changed"))
    if not set(wanted.tensors) <= set(header.tensors):
        return Verdict("stale", "has no flipped latents" if "latents" in header.tensors else "incomplete")
    return VALID if wanted.source is None else _check_source(wanted.source, source, stored.get("image"), hashes)


def plain(ingredients: Mapping[str, object]) -> dict[str, object]:
    """As JSON gives them back (tuples become lists)."""
    return json.loads(json.dumps(ingredients))


def _check_source(path: Path, noted: object, sha256: object, hashes: SourceHashes) -> Verdict:
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable_source(path, error) from error
    if noted == {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}:
        return VALID
    same_size = isinstance(noted, dict) and noted.get("size") == stat.st_size
    if same_size and hashes.identity(path).sha256 == sha256:
        return Verdict("valid", touched=True)
    return Verdict("stale", REASONS["image"])


def note_source(path: Path, source: SourceIdentity) -> None:
    """Puts the image's new time into a valid cache file, so that the next start can trust it unhashed. Where the folder cannot
    be written nothing happens."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["source"] = _noted(source)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with suppress(OutputError):
        write_atomically(path, lambda file: file.write(struct.pack("<Q", len(text)) + text + data[8 + length :]))


def _noted(source: SourceIdentity) -> str:
    return json.dumps({"size": source.size, "mtime_ns": source.mtime_ns})


def write_cache_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    ingredients: Mapping[str, object],
    source: SourceIdentity | None = None,
    details: Mapping[str, str] | None = None,
) -> None:
    """Writes atomically; equal arguments give equal bytes. ``details`` is metadata beyond the common keys.

    Raises OutputError when the disk is full or the folder cannot be written.
    """
    metadata = dict(details or {})
    if source is not None:
        ingredients = {**ingredients, "image": source.sha256}
        metadata["source"] = _noted(source)
    metadata["format"] = FORMAT
    metadata["ingredients"] = json.dumps(ingredients, sort_keys=True)
    metadata["fingerprint"] = fingerprint(plain(ingredients))
    metadata["crc32"] = json.dumps({name: checksum(tensors[name]) for name in sorted(tensors)})
    save_safetensors(path, tensors, metadata)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a CPU tensor's bytes."""
    import torch

    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load_cache_tensors(path: Path, names: Collection[str] | Callable[[str], bool]) -> dict[str, Tensor]:
    """For training: as ``read_cache_tensors``, but a damaged file is deleted, so that the next start makes it again.

    Raises DatasetError that names the file and says so.
    """
    try:
        return read_cache_tensors(path, names)
    except DamagedCacheError as error:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # Windows, while another thread reads it; or a folder that cannot be written
            raise DatasetError(f"{error}: delete it and start again, it will be made anew") from error
        raise DatasetError(f"{error}. It has been deleted and will be made again at the next start") from error


def read_cache_tensors(path: Path, names: Collection[str] | Callable[[str], bool]) -> dict[str, Tensor]:
    """The named tensors (or those that ``names`` accepts), in the dtype they were stored in, with their checksums compared.

    Raises DamagedCacheError, or another DatasetError when the file was removed or replaced since it was checked.
    """
    try:
        header = read_header(path)
        wanted = [name for name in header.tensors if names(name)] if callable(names) else list(names)
        missing = set(wanted) - set(header.tensors)
        if missing:
            raise DatasetError(f"the cache file {path} lacks {', '.join(sorted(missing))}: delete it and start again")
        tensors = dict(read_tensors(header, wanted))
        sums = json.loads(header.metadata["crc32"])
        broken = [name for name, tensor in tensors.items() if checksum(tensor) != sums[name]]
    except (CheckpointError, OSError) as error:
        raise _unusable(path, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its description is broken") from error
    if broken:
        raise _damaged(path, f"the bytes of {', '.join(broken)} are not those that were written")
    return tensors


def _unusable(path: Path, error: CheckpointError | OSError) -> DatasetError:
    """A failing disk damages a file; a file that is gone, or may not be read now, may be as it was."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError):
        return _damaged(path, unreadable(path, error).reason)
    why = cause.strerror or str(cause)
    if cause.errno == errno.EIO:
        return _damaged(path, why)
    return DatasetError(f"cannot read the cache file {path} ({why}): start again, and if it is gone it will be made anew")


def _damaged(path: Path, why: str) -> DamagedCacheError:
    return DamagedCacheError(f"the cache file {path} is damaged ({why})")


def clean_left_overs(folders: Iterable[Path]) -> int:
    """Removes temporary cache files that killed runs left in ``folders``; says how many."""
    return remove_left_overs(folders, f"*{SUFFIX}{TEMPORARY_MARK}*")


def make_folder(folder: Path) -> None:
    """Creates a cache folder. Raises DatasetError naming it when that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"cannot create the cache folder {folder}: {os_error_text(error)}") from error
