"""Where cache files lie. Names are computed when they are asked for: kept for every image they would take more memory than all
else that is known about it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from library.dataset.image_records import folder_mark

SUFFIX = ".safetensors"
MAX_NAME_BYTES = 230  # file systems allow 255; the rest is for the temporary name's ".tmp-PID-RANDOM"
MAX_CHARACTER_BYTES = 4  # UTF-8


class CacheNames:
    """The cache files of images: beside them, or all in ``cache_dir``. Safe in threads."""

    def __init__(self, cache_dir: Path | None):
        self._cache_dir = cache_dir
        self._starts: dict[str, str] = {}  # image folder -> what its cache files' paths begin with

    def path(self, image: Path, kind: str) -> str:
        """The cache of kind ``kind`` ("512x512.anima-latents") of an image.

        Under ``cache_dir`` a hash of the image's folder leads the name, so that equal names of two folders stay apart.
        """
        folder, name = os.path.split(image)
        start = self._starts.get(folder)
        if start is None:
            start = self._starts[folder] = self._start(folder)
        return start + _short_enough(name, f".{kind}{SUFFIX}")

    def _start(self, folder: str) -> str:
        if self._cache_dir is None:
            return os.path.join(folder, "") if folder else ""  # noqa: PTH118  # with the separator at its end
        return os.path.join(self._cache_dir, f"{folder_mark(Path(folder))}-")  # noqa: PTH118  # a path's beginning


def _short_enough(name: str, ending: str) -> str:
    room = MAX_NAME_BYTES - len(ending)
    if MAX_CHARACTER_BYTES * len(name) <= room:
        return name + ending
    encoded = os.fsencode(name)
    if len(encoded) <= room:
        return name + ending
    mark = "~" + hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[: room - len(mark)].decode("utf-8", "ignore") + mark + ending
