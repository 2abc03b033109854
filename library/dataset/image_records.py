"""What earlier runs found out about image files, so that a start reads only those that are new or have changed.

One JSON file for each folder of images, beside them or under --cache_dir:
``{"format": 2, "crc32": "89abcdef", "images": {name: [bytes, mtime in ns, ctime in ns, sha256, width, height, flags]}}``,
``crc32`` being that of all bytes behind it and ``flags`` a sum of ``HAS_ALPHA``, ``IS_TRANSPARENT`` and ``IS_BLACK``. Only files
that passed every check are in it. A file that is missing, damaged or of another format is as good as empty; where a folder
cannot be written nothing is remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from library.errors import DatasetError, OutputError
from library.files.atomic import write_atomically
from library.files.stamps import Stamp, stamp

RECORDS_NAME = "atelier.images.json"
FORMAT = 2  # raise it when the checks of library/dataset/verify.py get stricter, or the layout changes
HASH_CHUNK_BYTES = 1 << 20
HAS_ALPHA, IS_TRANSPARENT, IS_BLACK = 1, 2, 4

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """An image file as it was when its cache entry was made."""

    size: int
    mtime_ns: int
    sha256: str


class ImageRecord(NamedTuple):
    """A file that was read to its end and can be trained. ``size_wh`` is the upright picture's; sha256 has 32 bytes."""

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: bytes
    size_wh: Size
    has_alpha: bool
    is_transparent: bool = False  # its alpha channel is 0 everywhere
    is_black: bool = False  # its red channel, which counts in masks, is 0 everywhere

    def fits(self, stat: os.stat_result) -> bool:
        return self[:3] == stamp(stat)


class SourceHashes:
    """sha256 of image files, each computed once per object as long as the file's size and times stay the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, Stamp], str] = {}

    def identity(self, path: Path) -> SourceIdentity:
        """Raises DatasetError when the image cannot be read."""
        try:
            stat = path.stat()
            key = (path, stamp(stat))
            if key not in self._known:
                self._known[key] = sha256_of(path)
        except OSError as error:
            raise unreadable_source(path, error) from error
        return SourceIdentity(stat.st_size, stat.st_mtime_ns, self._known[key])


@dataclass(slots=True)
class _Folder:
    """The records of one folder by file name; ``changed`` since they were read from ``file``."""

    file: Path
    records: dict[str, ImageRecord]
    changed: bool = False


class ImageRecords:
    """The records of all folders that are asked for; each folder's file is read when first needed.

    ``reads=False`` and ``writes=False`` keep everything in memory. With several processes only the main one writes.
    """

    def __init__(self, cache_dir: Path | None = None, *, reads: bool = True, writes: bool = True):
        self.cache_dir, self.reads, self.writes = cache_dir, reads, writes
        self._folders: dict[str, _Folder] = {}
        self._sizes: dict[Size, Size] = {}  # few sizes, many images: equal ones are one object
        self._hashes = SourceHashes()
        self._lock = threading.Lock()

    def get(self, path: str | Path) -> ImageRecord | None:
        """What was found out about the file when it was last read, whether or not it has changed since."""
        folder, name = os.path.split(path)
        return self._folder(folder).records.get(name)

    def put(self, path: str | Path, record: ImageRecord) -> ImageRecord:
        """Notes a record until ``save``; gives back an equal one that shares its size with others."""
        folder, name = os.path.split(path)
        record = record._replace(size_wh=self._sizes.setdefault(record.size_wh, record.size_wh))
        known = self._folder(folder)
        known.records[name] = record
        known.changed = True
        return record

    def size_wh(self, path: Path) -> Size:
        """The size of the upright picture. Raises KeyError where the file was never read."""
        return self._recorded(path).size_wh

    def sha256(self, path: Path) -> bytes:
        """Of the whole file, when it was read. Raises KeyError where it never was."""
        return self._recorded(path).sha256

    def identity(self, path: Path) -> SourceIdentity:
        """The file as it is now; it is hashed only where it is new or changed. Safe in threads.

        Raises DatasetError when it cannot be read.
        """
        record = self.get(path)
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable_source(path, error) from error
        if record is None or not record.fits(stat):
            return self._hashes.identity(path)
        return SourceIdentity(record.size, record.mtime_ns, record.sha256.hex())

    def save(self) -> None:
        """Writes what has changed, without the names of files that are gone. A folder that cannot be written is left alone."""
        if not self.writes:
            return
        for path, folder in self._folders.items():
            if folder.changed:
                folder.changed = False
                with suppress(OSError, OutputError):
                    with os.scandir(path or os.curdir) as entries:
                        present = {entry.name for entry in entries}
                    kept = {name: record for name, record in folder.records.items() if name in present}
                    data = _encoded(kept)
                    write_atomically(folder.file, lambda file, data=data: file.write(data))  # type: ignore[misc]

    def _recorded(self, path: Path) -> ImageRecord:
        record = self.get(path)
        if record is None:
            raise KeyError(str(path))
        return record

    def _folder(self, path: str) -> _Folder:
        found = self._folders.get(path)
        if found is None:
            with self._lock:
                found = self._folders.get(path) or self._read_folder(path)
                self._folders[path] = found
        return found

    def _read_folder(self, path: str) -> _Folder:
        file = records_path(Path(path), self.cache_dir)
        return _Folder(file, _decoded(file, self._sizes) if self.reads else {})


def records_path(folder: Path, cache_dir: Path | None) -> Path:
    """Where the records of the images in ``folder`` lie."""
    return folder / RECORDS_NAME if cache_dir is None else cache_dir / f"{folder_mark(folder)}-{RECORDS_NAME}"


def folder_mark(folder: Path) -> str:
    """Eight hex digits that keep the files of different image folders apart where they share a folder."""
    return hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def unreadable_source(path: Path, error: OSError) -> DatasetError:
    return DatasetError(f"cannot read {path}: {error.strerror or error}; was it moved or deleted after the start?")


def _encoded(records: dict[str, ImageRecord]) -> bytes:
    rows = {
        name: [
            size,
            mtime_ns,
            ctime_ns,
            sha256.hex(),
            *size_wh,
            HAS_ALPHA * alpha + IS_TRANSPARENT * transparent + IS_BLACK * black,
        ]
        for name, (size, mtime_ns, ctime_ns, sha256, size_wh, alpha, transparent, black) in records.items()
    }
    rest = f',"images":{json.dumps(rows, separators=(",", ":"))}}}'.encode("ascii")  # names that are no text are escaped
    return _start(zlib.crc32(rest)) + rest


def _start(checksum: int) -> bytes:
    return f'{{"format":{FORMAT},"crc32":"{checksum:08x}"'.encode("ascii")


def _decoded(file: Path, sizes: dict[Size, Size]) -> dict[str, ImageRecord]:
    """Empty where the file is missing, of another format, or not what was written."""
    try:
        data = file.read_bytes()
        length = len(_start(0))
        if data[:length] != _start(zlib.crc32(data[length:])):
            return {}
        rows = json.loads(data)["images"]
        return {sys.intern(name): _record(row, sizes) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _record(row: list[Any], sizes: dict[Size, Size]) -> ImageRecord:
    size, mtime_ns, ctime_ns, sha256, width, height, flags = row
    size_wh = sizes.setdefault((width, height), (width, height))
    is_transparent, is_black = bool(flags & IS_TRANSPARENT), bool(flags & IS_BLACK)
    return ImageRecord(
        size, mtime_ns, ctime_ns, bytes.fromhex(sha256), size_wh, bool(flags & HAS_ALPHA), is_transparent, is_black
    )
