"""Where cache files lie. Names are computed when they are asked for: kept for every image they would take more memory than all
else that is known about it."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from library.dataset.image_records import folder_mark

SUFFIX = ".safetensors"
MAX_NAME_BYTES = 230  # file systems allow 255; the rest is for the temporary name's ".tmp-PID-RANDOM"
MAX_CHARACTER_BYTES = 4  # UTF-8


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of images, by whatever paths it is named. ``names`` holds one spelling of each file's name where letter case makes
    no difference; None where it does."""

    path: str  # as it was named first
    start: str  # what its cache files' paths begin with
    names: dict[str, str] | None


class CacheNames:
    """The cache files of images: beside them, or all in ``cache_dir``. Safe in threads once ``one_name`` has seen all images.

    An image has one cache file however its path is written: through a link, relative or absolute, in other letter case.
    """

    def __init__(self, cache_dir: Path | None):
        self._cache_dir = cache_dir
        self._folders: dict[str, _Folder] = {}  # by path as written
        self._by_identity: dict[Hashable, _Folder] = {}

    def path(self, image: Path, kind: str) -> str:
        """The cache of kind ``kind`` ("512x512.anima-latents") of an image.

        Under ``cache_dir`` a hash of the image's folder leads the name, so that equal names of two folders stay apart.
        """
        folder, name = self._place(image)
        return folder.start + _short_enough(name, f".{kind}{SUFFIX}")

    def one_name(self, image: Path) -> str:
        """The same text for all paths of one image."""
        folder, name = self._place(image)
        return os.path.join(folder.path, name)  # noqa: PTH118  # a name, no Path: there are very many

    def _place(self, image: Path) -> tuple[_Folder, str]:
        path, name = os.path.split(image)
        folder = self._folders.get(path)
        if folder is None:
            folder = self._folders[path] = self._folder(path, name)
        return folder, name if folder.names is None else _one_spelling(folder.names, folder.path, name)

    def _folder(self, path: str, name: str) -> _Folder:
        identity = _identity(path)
        found = self._by_identity.get(identity)
        if found is None:
            names: dict[str, str] | None = {} if _is_same(path, name, name.swapcase()) else None
            found = self._by_identity[identity] = _Folder(path, self._start(path), names)
        return found

    def _start(self, folder: str) -> str:
        if self._cache_dir is None:
            return os.path.join(folder, "") if folder else ""  # noqa: PTH118  # with the separator at its end
        mark = folder_mark(Path(os.path.realpath(folder)))
        return os.path.join(self._cache_dir, f"{mark}-")  # noqa: PTH118  # a path's beginning


def _identity(folder: str) -> Hashable:
    """Equal for all paths of a folder."""
    try:
        stat = os.stat(folder or os.curdir)  # noqa: PTH116
    except OSError:
        return os.path.realpath(folder)
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.normcase(os.path.realpath(folder))


def _one_spelling(names: dict[str, str], folder: str, name: str) -> str:
    """The first one of those that name the same file."""
    first = names.setdefault(unicodedata.normalize("NFC", name).lower(), name)
    return first if first == name or _is_same(folder, first, name) else name


def _is_same(folder: str, one: str, other: str) -> bool:
    """Whether two names of a folder are of one file."""
    try:
        return one != other and os.path.samefile(os.path.join(folder, one), os.path.join(folder, other))  # noqa: PTH118, PTH121
    except OSError:
        return False


def _short_enough(name: str, ending: str) -> str:
    room = MAX_NAME_BYTES - len(ending)
    if MAX_CHARACTER_BYTES * len(name) <= room:
        return name + ending
    encoded = os.fsencode(name)
    if len(encoded) <= room:
        return name + ending
    mark = "~" + hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[: room - len(mark)].decode("utf-8", "ignore") + mark + ending
