"""Latents of every image, encoded once: kept in memory or in one file per image and size.

A cache file ``<image file name>.<W>x<H>.<arch>-latents.safetensors`` holds ``latents`` (C, h, w) and, where flip_aug is on,
``latents_flipped``: the latents of the mirrored image, which are not the mirrored latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset.batch import normalized_pixels
from library.dataset.cache_check import TensorCheck
from library.dataset.cache_file import (
    MISSING,
    VALID,
    CacheState,
    SourceHashes,
    SourceIdentity,
    Verdict,
    Wanted,
    cache_path,
    check,
    clean_left_overs,
    fingerprint,
    load_cache_tensors,
    make_folder,
    note_source,
    write_cache_file,
)
from library.dataset.cache_share import ROUND_BYTES, Gather, shared
from library.dataset.cache_writer import CacheWriter, FillReport, report_filled, report_stale
from library.dataset.hot_tensors import HotTensors
from library.dataset.images import load_pixels
from library.dataset.items import Item, TrainingSet
from library.dataset.prefetch import prefetch
from library.errors import DatasetError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LATENTS = "latents"
FLIPPED = "latents_flipped"
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}
HEADER_BYTES = 1024  # about what a cache file's header takes
CHECKERS = 8  # threads that look at cache files; it is the disk or the network that they wait for

Encode = Callable[["Tensor"], "Tensor"]  # (B, 3, H, W) float32 in [-1, 1] -> (B, C, h, w) scaled latents


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRecipe:
    """What latents depend on beside the image. ``dtype`` ("bfloat16") is the one they are kept in."""

    arch: str
    vae_fingerprint: str
    dtype: str
    channels: int = 16  # for estimates only
    shrink: int = 8  # pixels per latent, for estimates only


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One thing to cache: an image at one size. Items of several datasets may share it."""

    item: Item
    path: Path
    flip: bool

    @property
    def tensors(self) -> tuple[str, ...]:
        return (LATENTS, FLIPPED) if self.flip else (LATENTS,)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Entries that are encoded together, and which of them are to be kept."""

    entries: tuple[_Entry, ...]
    wanted: set[_Entry]


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """What a reading thread makes of a group: pixels (B, 3, H, W) in [-1, 1], and the image files as they were then."""

    group: _Group
    pixels: np.ndarray
    identities: dict[_Entry, SourceIdentity]


class LatentCache:
    """The latents of a training set.

    ``skip_check`` takes every cache file that is there for valid (``--skip_cache_check``). ``round_bytes``: how much the
    processes of a run hand over at once when they share a cache in memory.
    """

    def __init__(
        self,
        training_set: TrainingSet,
        recipe: LatentRecipe,
        *,
        on_disk: bool,
        cache_dir: Path | None = None,
        skip_check: bool = False,
    ):
        self.recipe, self.on_disk, self.cache_dir, self.skip_check = recipe, on_disk, cache_dir, skip_check
        self.round_bytes = ROUND_BYTES
        self.tensor_check = TensorCheck()
        self._hashes = SourceHashes()
        self._hot = HotTensors()
        self._memory: dict[Path, dict[str, Tensor]] = {}
        self._judged: list[tuple[_Entry, Verdict]] | None = None
        self._paths = self._name_all(training_set.items)
        self._entries = self._unique_entries(training_set.items)

    def state(self, *, refresh: bool = False) -> CacheState:
        """How much of the cache is there. Reads headers, the tensors of files that are due (see ``TensorCheck``) and images whose
        time changed; needs no torch.

        ``refresh`` notes the new time of images that were touched or copied but have not changed in their cache files, so that
        the next start need not hash them again; without it nothing is written. The answer is kept until ``fill``.
        """
        if self._judged is None:
            self._judged = self._judge(self._entries)
        judged = self._judged
        if refresh:
            self._note_touched(judged)
        kinds = [verdict.kind for _, verdict in judged]
        return CacheState(
            total=len(judged),
            valid=kinds.count("valid"),
            missing=kinds.count("missing"),
            stale=_stale(judged),
            bytes_needed=sum(self._bytes(entry) for entry, verdict in judged if not verdict.valid),
            in_memory=not self.on_disk,
        )

    def fill(  # noqa: PLR0913  # the trainer's one call
        self,
        encode: Encode,
        *,
        batch_size: int,
        workers: int,
        rank: int = 0,
        processes: int = 1,
        gather: Gather | None = None,
        progress: bool = True,
    ) -> FillReport:
        """Encodes what is missing, stale or damaged. ``encode`` runs in this thread; reading and writing in others.

        Images are encoded in fixed groups: each ``batch_size`` consecutive images of a size in the order of the training set. A
        group with a missing member is encoded whole and only what was missing is kept, so that a fill that was interrupted ends
        with the same values as one that was not. Every file is complete or absent, and stays when a later one fails.

        Process ``rank`` of ``processes`` does every ``processes``-th group. On disk the caller waits for all processes before
        it loads; in memory ``gather`` (an all-gather of Python objects) shares the results, piece by piece.

        Raises DatasetError for an image that cannot be read or gives latents that are not finite, OutputError for a full disk.
        """
        started = time.monotonic()
        self._hot = HotTensors()  # what was read before may be made again
        self._judged = None
        groups = self._groups(batch_size)[rank::processes]
        todo = self._with_gaps(groups)
        wanted = sum(len(group.wanted) for group in todo)
        self._prepare(rank, anything=wanted > 0)
        if wanted:
            self._encode_all(encode, todo, wanted=wanted, workers=workers, progress=progress and rank == 0)
        if not self.on_disk and processes > 1:
            self._share(groups, gather, processes=processes)
        report = FillReport(wanted, sum(len(group) for group in groups) - wanted, time.monotonic() - started)
        if rank == 0:
            report_filled("latent", report, self._place())
        return report

    def load(self, item: Item, *, flipped: bool = False) -> Tensor:
        """(C, h, w) in the dtype they were cached in. Safe in threads.

        Raises DatasetError for a file damaged since the start, and deletes it so that the next start makes it again.
        """
        name = FLIPPED if flipped else LATENTS
        path = self._paths[item.index]
        if self.on_disk:
            return self._hot.get((path, name), lambda: load_cache_tensors(path, [name]))[name]
        return self._memory[path][name]

    def _name_all(self, items: Sequence[Item]) -> list[Path]:
        """The cache file of each item. Where one image has one bucket size but is resized or cropped in two ways (two datasets
        with different settings), the later way's name gets a mark of its own."""
        first_use: dict[Path, str] = {}
        paths = []
        for item in items:
            width, height = item.bucket_wh
            kind = f"{self.recipe.arch}-latents"
            mark = fingerprint(self._geometry(item))[:8]
            path = cache_path(item.path, f"{width}x{height}.{kind}", self.cache_dir)
            if first_use.setdefault(path, mark) != mark:
                path = cache_path(item.path, f"{width}x{height}-{mark}.{kind}", self.cache_dir)
            paths.append(path)
        return paths

    def _unique_entries(self, items: Sequence[Item]) -> tuple[_Entry, ...]:
        users_of: dict[Path, list[Item]] = {}
        for item in items:
            users_of.setdefault(self._paths[item.index], []).append(item)
        return tuple(_Entry(users[0], path, any(item.subset.flip_aug for item in users)) for path, users in users_of.items())

    def _geometry(self, item: Item) -> dict[str, object]:
        return {"bucket": item.bucket_wh, "resized": item.resized_wh, "crop": item.crop_left_top,
                "interpolation": item.subset.resize_interpolation or ""}  # fmt: skip

    def _ingredients(self, item: Item) -> dict[str, object]:
        recipe = self.recipe
        return {"arch": recipe.arch, "model": recipe.vae_fingerprint, "dtype": recipe.dtype, **self._geometry(item)}

    def _judge(self, entries: Sequence[_Entry]) -> list[tuple[_Entry, Verdict]]:
        with ThreadPoolExecutor(CHECKERS) as pool:
            if self.on_disk and not self.skip_check:
                self.tensor_check.choose([entry.path for entry in entries], pool)
            return list(pool.map(lambda entry: (entry, self._verdict(entry)), entries))

    def _note_touched(self, judged: Sequence[tuple[_Entry, Verdict]]) -> None:
        for entry, verdict in judged:
            if verdict.touched:
                note_source(entry.path, self._hashes.identity(entry.item.path))

    def _verdict(self, entry: _Entry) -> Verdict:
        if not self.on_disk:
            return VALID if entry.path in self._memory else MISSING
        if self.skip_check:
            return VALID if entry.path.is_file() else MISSING
        wanted = Wanted(ingredients=self._ingredients(entry.item), source=entry.item.path, tensors=entry.tensors)
        return check(entry.path, wanted, hashes=self._hashes, broken=self.tensor_check.broken)

    def _bytes(self, entry: _Entry) -> int:
        (width, height), recipe = entry.item.bucket_wh, self.recipe
        values = recipe.channels * (width // recipe.shrink) * (height // recipe.shrink)
        return len(entry.tensors) * values * BYTES_PER_VALUE.get(recipe.dtype, 4) + (HEADER_BYTES if self.on_disk else 0)

    def _groups(self, batch_size: int) -> list[tuple[_Entry, ...]]:
        buckets: dict[tuple[int, int], list[_Entry]] = {}
        for entry in self._entries:
            buckets.setdefault(entry.item.bucket_wh, []).append(entry)
        return [
            tuple(entries[start : start + batch_size])
            for _, entries in sorted(buckets.items())
            for start in range(0, len(entries), batch_size)
        ]

    def _with_gaps(self, groups: Sequence[tuple[_Entry, ...]]) -> list[_Group]:
        judged = self._judge([entry for group in groups for entry in group])
        self._note_touched(judged)
        report_stale("latent", _stale(judged))
        gaps = {entry for entry, verdict in judged if not verdict.valid}
        return [_Group(group, gaps.intersection(group)) for group in groups if not gaps.isdisjoint(group)]

    def _place(self) -> str:
        if not self.on_disk:
            return "in memory"
        return "beside the images" if self.cache_dir is None else str(self.cache_dir)

    def _prepare(self, rank: int, *, anything: bool) -> None:
        if not self.on_disk:
            return
        if self.cache_dir is not None and anything:
            make_folder(self.cache_dir)
        if rank == 0:
            clean_left_overs(entry.path.parent for entry in self._entries)

    def _encode_all(self, encode: Encode, todo: list[_Group], *, wanted: int, workers: int, progress: bool) -> None:
        from tqdm import tqdm

        size = sum(self._bytes(entry) for group in todo for entry in group.wanted)
        with (
            tqdm(total=wanted, desc="caching latents", unit="image", disable=not progress) as bar,
            CacheWriter("latents", total=wanted, bytes_each=size / wanted, on_written=bar.update) as writer,
            prefetch(_read_group, todo, workers=max(workers, 1), depth=max(workers, 1) + 1) as sources,
        ):
            for source in sources:
                for entry, tensors in self._encode_group(encode, source):
                    if entry in source.group.wanted:
                        writer.submit(partial(self._commit, entry, source.identities[entry], tensors))

    def _encode_group(self, encode: Encode, source: _Source) -> Iterator[tuple[_Entry, dict[str, Tensor]]]:
        """Each entry with its tensors (C, h, w). Mirrored images go in a batch of their own, so that switching flip_aug on
        leaves the other latents as they are."""
        entries, pixels = source.group.entries, source.pixels  # (B, 3, H, W)
        found = {entry: {LATENTS: latents} for entry, latents in self._encode_pixels(encode, entries, pixels)}
        flips = [position for position, entry in enumerate(entries) if entry.flip]
        if flips:
            mirrored = tuple(entries[position] for position in flips)
            for entry, latents in self._encode_pixels(encode, mirrored, pixels[flips][..., ::-1]):
                found[entry][FLIPPED] = latents
        yield from found.items()

    def _encode_pixels(self, encode: Encode, entries: tuple[_Entry, ...], pixels: np.ndarray) -> list[tuple[_Entry, Tensor]]:
        import numpy as np
        import torch

        latents = encode(torch.from_numpy(np.ascontiguousarray(pixels)))
        latents = latents.detach().to(device="cpu", dtype=getattr(torch, self.recipe.dtype))
        if latents.shape[0] != len(entries):
            raise ValueError(f"the encoder gave {latents.shape[0]} latents for {len(entries)} images")
        # clones, no views: an image that is kept must not hold its whole group in memory
        found = [(entry, one.clone()) for entry, one in zip(entries, latents, strict=True)]
        bad = [entry.item.path for entry, one in found if not bool(torch.isfinite(one).all())]
        if bad:
            raise DatasetError(*(_not_finite(path, self.recipe.dtype) for path in bad))
        return found

    def _commit(self, entry: _Entry, identity: SourceIdentity, tensors: dict[str, Tensor]) -> None:
        if self.on_disk:
            write_cache_file(entry.path, tensors, ingredients=self._ingredients(entry.item), source=identity)
        else:
            self._memory[entry.path] = tensors

    def _share(self, groups: Sequence[tuple[_Entry, ...]], gather: Gather | None, *, processes: int) -> None:
        own = {entry.path: self._memory[entry.path] for group in groups for entry in group}
        for path, tensors in shared(own, gather, processes=processes, round_bytes=self.round_bytes):
            self._memory.setdefault(path, tensors)


def _read_group(group: _Group) -> _Source:
    hashes = SourceHashes()
    # hashed before they are decoded: an image replaced in between counts as changed at the next start
    identities = {entry: hashes.identity(entry.item.path) for entry in group.entries}
    return _Source(group, normalized_pixels([load_pixels(entry.item) for entry in group.entries]), identities)


def _stale(judged: Sequence[tuple[_Entry, Verdict]]) -> tuple[tuple[Path, str], ...]:
    return tuple((entry.path, verdict.line) for entry, verdict in judged if verdict.kind in ("stale", "damaged"))


def _not_finite(path: Path, dtype: str) -> str:
    return (
        f"the VAE gives values that are not finite for {path}: look at the image (remove it if it is damaged) or, if it is "
        f"fine, at the VAE's precision ({dtype}): --no_half_vae encodes in float32"
    )
