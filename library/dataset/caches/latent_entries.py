"""Which latents a training set needs: for each image at each size one cache file, its name, and what it depends on. Torch-free.

A cache file ``<image file name>.<W>x<H>.<arch>-latents.safetensors`` holds ``latents`` (C, h, w); where flip_aug is on
``latents_flipped``, the latents of the mirrored image, which are not the mirrored latents; and where the image has a loss mask
``mask`` (h, w) float32.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.dataset.caches.cache_file import Wanted, recipe_mark
from library.dataset.caches.check import Asked
from library.dataset.caches.names import CacheNames
from library.dataset.items import Item

LATENTS = "latents"
FLIPPED = "latents_flipped"
MASK = "mask"
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}
HEADER_BYTES = 1024  # about what a cache file's header takes
ALPHA = "alpha"  # the ingredient "mask" where the image's own alpha channel is the mask; else the mask file's sha256

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRecipe:
    """What latents depend on beside the image. ``dtype`` ("bfloat16") is the one they are kept in."""

    arch: str
    vae_fingerprint: str
    dtype: str
    channels: int = 16
    shrink: int = 8  # pixels per latent


@dataclass(frozen=True, slots=True, eq=False)
class LatentEntry:
    """One thing to cache: an image at one size. Items of several datasets may share it; ``item`` is one of them, with the mask if
    any has one. ``mark`` is part of the file's name where one image has one size in two ways."""

    item: Item
    mark: str
    flip: bool

    @property
    def tensors(self) -> tuple[str, ...]:
        return (LATENTS, *((FLIPPED,) if self.flip else ()), *((MASK,) if self.item.is_masked else ()))


class LatentEntries:
    """The entries of a list of items, ``all`` in their order. Names are computed when they are asked for. Safe in threads."""

    def __init__(self, items: Sequence[Item], recipe: LatentRecipe, cache_dir: Path | None):
        self.recipe = recipe
        self._names = CacheNames(cache_dir)
        self._marks: dict[int, str] = {}  # of items whose file's name has one
        self._keys: dict[tuple[Geometry, tuple[str, ...], bool], str] = {}
        self._recipes: dict[Geometry, str] = {}
        self.all = self._joined(items)

    def path(self, entry: LatentEntry) -> str:
        return self._path(entry.item, entry.mark)

    def path_of(self, item: Item) -> str:
        """The file that holds an item's latents."""
        return self._path(item, self._marks.get(item.index, ""))

    def asked(self, entry: LatentEntry) -> Asked:
        return Asked(self.path(entry), self._key(entry), tuple(map(os.fspath, sources(entry).values())))

    def wanted(self, entry: LatentEntry) -> Wanted:
        return Wanted(ingredients=self.ingredients(entry.item), sources=sources(entry), tensors=entry.tensors)

    def ingredients(self, item: Item) -> dict[str, object]:
        """Without what comes from the sources."""
        recipe, (bucket, resized, crop, interpolation) = self.recipe, geometry(item)
        alpha = {MASK: ALPHA} if item.is_masked and item.mask_path is None else {}
        return {"arch": recipe.arch, "model": recipe.vae_fingerprint, "dtype": recipe.dtype, "bucket": list(bucket),
                "resized": list(resized), "crop": list(crop), "interpolation": interpolation, **alpha}  # fmt: skip

    def recipe_of(self, item: Item) -> str:
        """The ``recipe_mark`` of an item's file, which items with and without masks may share."""
        way = geometry(item)
        found = self._recipes.get(way)
        if found is None:
            found = self._recipes[way] = recipe_mark(self.ingredients(item))
        return found

    def latent_hw(self, item: Item) -> tuple[int, int]:
        width, height = item.bucket_wh
        return height // self.recipe.shrink, width // self.recipe.shrink

    def tensor_bytes(self, entry: LatentEntry) -> int:
        """About what the tensors of an entry take."""
        height, width = self.latent_hw(entry.item)
        values = self.recipe.channels * BYTES_PER_VALUE.get(self.recipe.dtype, 4) * (2 if entry.flip else 1)
        return (values + (BYTES_PER_VALUE["float32"] if entry.item.is_masked else 0)) * height * width

    def _path(self, item: Item, mark: str) -> str:
        width, height = item.bucket_wh
        return self._names.path(item.path, f"{width}x{height}{mark}.{self.recipe.arch}-latents")

    def _key(self, entry: LatentEntry) -> str:
        parts = (geometry(entry.item), entry.tensors, entry.item.mask_path is None)
        key = self._keys.get(parts)
        if key is None:
            key = self._keys[parts] = _digest([self.ingredients(entry.item), entry.tensors])
        return key

    def _joined(self, items: Sequence[Item]) -> tuple[LatentEntry, ...]:
        """Where one image has one bucket size but is resized, cropped or masked in two ways (two datasets with different
        settings), the later way's name gets a mark of its own."""
        first_use: dict[tuple[str, tuple[int, int]], tuple[Geometry, Path | str | None]] = {}
        found: dict[tuple[str, tuple[int, int], str], LatentEntry] = {}
        for item in items:
            where = (self._names.one_name(item.path), item.bucket_wh)
            way, mask = first_use.setdefault(where, (geometry(item), mask_of(item)))
            mark = ""
            if way != geometry(item) or (mask != mask_of(item) and mask is not None and item.is_masked):
                mark = self._marks[item.index] = f"-{_digest([geometry(item), str(mask_of(item))])[:8]}"
            elif mask is None:
                first_use[where] = (way, mask_of(item))
            name = (*where, mark)
            found[name] = _joined_entry(found.get(name), item, mark)
        return tuple(found.values())


def _joined_entry(entry: LatentEntry | None, item: Item, mark: str) -> LatentEntry:
    """An entry with one more user."""
    if entry is None:
        return LatentEntry(item, mark, item.subset.flip_aug)
    user = item if item.is_masked and not entry.item.is_masked else entry.item
    return LatentEntry(user, mark, entry.flip or item.subset.flip_aug)


def geometry(item: Item) -> Geometry:
    return item.bucket_wh, item.resized_wh, item.crop_left_top, item.subset.resize_interpolation or ""


def mask_of(item: Item) -> Path | str | None:
    """What the item's mask comes from."""
    if not item.is_masked:
        return None
    return ALPHA if item.mask_path is None else item.mask_path


def sources(entry: LatentEntry) -> dict[str, Path]:
    """The files that an entry is made from, by the names of their ingredients."""
    item = entry.item
    return {"image": item.path} if item.mask_path is None else {"image": item.path, MASK: item.mask_path}


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
