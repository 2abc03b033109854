"""Latents of every image, encoded once: kept in memory or in one file per image and size (see ``latent_entries``), with the
image's loss mask where it has one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset.batch import normalized_pixels
from library.dataset.caches.adoption import Adoption, misfit
from library.dataset.caches.cache_file import (
    MISSING,
    VALID,
    CacheState,
    Verdict,
    broken_tensors,
    check_header,
    clean_left_overs,
    make_folder,
    tensors_named,
    unreadable,
    write_cache_file,
)
from library.dataset.caches.check import CacheCheck, Found, source_stamps
from library.dataset.caches.latent_entries import (
    FLIPPED,
    HEADER_BYTES,
    LATENTS,
    MASK,
    LatentEntries,
    LatentEntry,
    LatentRecipe,
    sources,
)
from library.dataset.caches.notes import CacheNotes
from library.dataset.caches.rows import Column, MemoryEntry, RowReader, RowSource, stacked
from library.dataset.caches.share import ROUND_BYTES, Gather, shared
from library.dataset.caches.writer import CacheWriter, FillReport, progress_bar, report_filled, report_stale
from library.dataset.image_records import SourceHashes, SourceIdentity
from library.dataset.images import load_picture
from library.dataset.items import Item, TrainingSet
from library.dataset.prefetch import prefetch
from library.errors import CheckpointError, DatasetError
from library.files.safetensors_file import TensorFile

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ADOPTERS = 2  # threads that read entries of another program

# (B, 3, H, W) float32 in [-1, 1], and a seed of each image for what is drawn at random -> (B, C, h, w) scaled latents
Encode = Callable[["Tensor", Sequence[int]], "Tensor"]
# An item and the names of the tensors that are wanted -> tensors that another program made, or why there are none
ReadForeign = Callable[[Item, tuple[str, ...]], "dict[str, Tensor] | str"]


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Entries that are encoded together, and which of them are to be kept."""

    entries: tuple[LatentEntry, ...]
    wanted: set[LatentEntry]


@dataclass(frozen=True, slots=True, eq=False)
class _Origin:
    """What one entry is made from, as its files were right before they were decoded."""

    identities: dict[str, SourceIdentity]
    stamps: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """What a reading thread makes of a group: pixels (B, 3, H, W) in [-1, 1] and each entry's mask (h, w) in [0, 1]."""

    group: _Group
    pixels: np.ndarray
    masks: dict[LatentEntry, np.ndarray | None]
    origins: dict[LatentEntry, _Origin]


class LatentCache:
    """The latents of a training set, those of its validation images included.

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
        self._entries = LatentEntries(training_set.all_items, recipe, cache_dir)
        self._identify = (training_set.records or SourceHashes()).identity
        self._notes = CacheNotes(f"{recipe.arch}-latents")
        self.check: CacheCheck[LatentEntry, Verdict] = CacheCheck(self._notes, ask=self._entries.asked, open_file=self._open)
        self._rows = RowReader()
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._state: CacheState | None = None

    def state(self, *, refresh: bool = False, again: bool = False) -> CacheState:
        """How much of the cache is there. Reads the headers and tensors of files that earlier starts have not checked, or that
        have changed since (see ``cache_check``), and images whose times changed; needs no torch.

        ``refresh`` notes what was found valid, so that the next start need not look again; without it nothing is written. The
        answer is kept until ``fill``, or until it is asked for ``again``.
        """
        if again:
            self._forget()
        if self._state is None:
            self._state = self._state_of(self._judge(self._entries.all))
        if refresh:
            self._notes.save()
        return self._state

    @property
    def contents(self) -> str:
        """What ``state`` counts, where that needs words: these are images."""
        return ""

    def adopt(
        self, read: ReadForeign, *, rank: int = 0, processes: int = 1, gather: Gather | None = None, progress: bool = True
    ) -> None:
        """Takes over what another program made of the entries that are missing, stale or damaged.

        ``read`` is asked for the latents of an item, and for the mirrored ones where they are wanted (masks are made here). What
        it gives becomes an ordinary entry if it fits; a text says why there is nothing. One log line tells how many entries were
        taken over and why others were not. Process ``rank`` of ``processes`` sees to every ``processes``-th entry; caches in
        memory are shared through ``gather``, with which the log line also tells of all processes.
        """
        own = self._entries.all[rank::processes]
        gaps = [entry for entry, verdict in zip(own, self._judge(own), strict=True) if not verdict.valid]
        self._prepare(rank, anything=bool(gaps))
        adoption = Adoption()
        with (
            progress_bar("taking over latents", "image", total=len(gaps), shown=progress and rank == 0) as bar,
            CacheWriter("latents", total=len(gaps), bytes_each=self._mean_bytes(gaps), on_written=bar.update) as writer,
            prefetch(partial(self._read_foreign, read), gaps, workers=ADOPTERS, depth=4 * ADOPTERS) as found,
        ):
            for entry, (origin, tensors) in zip(gaps, found, strict=True):
                if isinstance(tensors, str):
                    adoption.refuse(tensors, entry.item.path)
                    bar.update(1)
                else:
                    adoption.taken += 1
                    writer.submit(partial(self._commit, entry, origin, tensors))
        self._finish_adoption(own, adoption, gather, processes=processes)

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
        self._forget()
        groups = self._groups(batch_size)[rank::processes]
        todo = self._with_gaps(groups)
        wanted = sum(len(group.wanted) for group in todo)
        self._prepare(rank, anything=wanted > 0)
        try:
            if wanted:
                self._encode_all(encode, todo, wanted=wanted, workers=workers, progress=progress and rank == 0)
        finally:
            self._notes.save()
        if not self.on_disk and processes > 1:
            self._share([entry for group in groups for entry in group], gather, processes=processes)
        report = FillReport(wanted, sum(len(group) for group in groups) - wanted, time.monotonic() - started)
        together = gather if processes > 1 else None
        if rank == 0 or together is not None:
            report_filled("latent", report, self._place(), gather=together)
        return report

    def load(self, item: Item, *, flipped: bool = False) -> Tensor:
        """An image's latents (C, h, w), as ``load_batch``."""
        latents, _ = self.load_batch([(item, flipped)])
        return latents[0]

    def load_batch(self, shown: Sequence[tuple[Item, bool]]) -> tuple[Tensor, Tensor | None]:
        """The latents (B, C, h, w) of items of one size, in the dtype they were cached in, of the mirrored image where the item's
        flag says so; and their loss masks (B, 1, h, w), float32 in [0, 1], mirrored with their images: ones where an item has
        none, None where no item has one. Safe in threads.

        Raises DatasetError for a file damaged since the start, and deletes it so that the next start makes it again.
        """
        sources = [self._source(item, flipped=flipped) for item, flipped in shown]
        columns = self._rows.load(sources) if self.on_disk else self._from_memory(sources)
        masks = columns.get(MASK)
        return columns[LATENTS].tensor, None if masks is None else _mask_batch(masks, [flipped for _, flipped in shown])

    def _source(self, item: Item, *, flipped: bool) -> RowSource:
        path = self._entries.path_of(item)
        names = {LATENTS: FLIPPED if flipped else LATENTS, **({MASK: MASK} if item.is_masked else {})}
        recipe = None if self.skip_check else self._entries.recipe_of(item)
        return RowSource(path, (path, *names.values()), tensors_named(path, names), recipe)

    def _from_memory(self, sources: Sequence[RowSource]) -> dict[str, Column]:
        kept = [(path, self._memory[path], pick) for path, _, pick, _ in sources]
        return stacked([MemoryEntry(path, {name: own[stored] for name, stored in pick(own).items()}) for path, own, pick in kept])

    # what is there

    def _judge(self, entries: Sequence[LatentEntry]) -> Sequence[Verdict]:
        if not self.on_disk:
            return [VALID if self._entries.path(entry) in self._memory else MISSING for entry in entries]
        if self.skip_check:
            return [VALID if Path(self._entries.path(entry)).is_file() else MISSING for entry in entries]
        verdicts = self.check.judge(entries)
        self._notes.release()
        return verdicts

    def _open(self, entry: LatentEntry, found: Found) -> Verdict:
        try:
            with TensorFile(found.path) as file:
                file.tensors()
                verdict = check_header(file, self._entries.wanted(entry), identify=self._identify)
                broken = broken_tensors(file, entry.tensors) if verdict.valid and found.read_whole else {}
        except CheckpointError as error:
            return unreadable(found.path, error)
        return Verdict("damaged", next(iter(broken.values()))) if broken else verdict

    def _state_of(self, verdicts: Sequence[Verdict]) -> CacheState:
        judged = list(zip(self._entries.all, verdicts, strict=True))
        return CacheState(
            total=len(judged),
            valid=sum(verdict.valid for verdict in verdicts),
            missing=sum(verdict.kind == "missing" for verdict in verdicts),
            stale=self._stale(judged),
            bytes_needed=sum(self._bytes(entry) for entry, verdict in judged if not verdict.valid),
            in_memory=not self.on_disk,
        )

    def _stale(self, judged: Sequence[tuple[LatentEntry, Verdict]]) -> tuple[tuple[Path, str], ...]:
        return tuple(
            (Path(self._entries.path(entry)), verdict.line) for entry, verdict in judged if verdict.kind in ("stale", "damaged")
        )

    def _bytes(self, entry: LatentEntry) -> int:
        return self._entries.tensor_bytes(entry) + (HEADER_BYTES if self.on_disk else 0)

    def _mean_bytes(self, entries: Sequence[LatentEntry]) -> float:
        return sum(map(self._bytes, entries)) / max(len(entries), 1)

    def _place(self) -> str:
        if not self.on_disk:
            return "in memory"
        return "beside the images" if self.cache_dir is None else str(self.cache_dir)

    # making what is not there

    def _groups(self, batch_size: int) -> list[tuple[LatentEntry, ...]]:
        buckets: dict[tuple[int, int], list[LatentEntry]] = {}
        for entry in self._entries.all:
            buckets.setdefault(entry.item.bucket_wh, []).append(entry)
        return [
            tuple(entries[start : start + batch_size])
            for _, entries in sorted(buckets.items())
            for start in range(0, len(entries), batch_size)
        ]

    def _with_gaps(self, groups: Sequence[tuple[LatentEntry, ...]]) -> list[_Group]:
        entries = [entry for group in groups for entry in group]
        judged = list(zip(entries, self._judge(entries), strict=True))
        report_stale("latent", self._stale(judged))
        gaps = {entry for entry, verdict in judged if not verdict.valid}
        return [_Group(group, gaps.intersection(group)) for group in groups if not gaps.isdisjoint(group)]

    def _forget(self) -> None:
        """What was read or judged before may be made again."""
        self._rows = RowReader()
        self._state = None

    def _prepare(self, rank: int, *, anything: bool) -> None:
        if not self.on_disk:
            return
        if self.cache_dir is not None and anything:
            make_folder(self.cache_dir)
        if rank == 0:
            folders = {entry.item.path.parent for entry in self._entries.all} if self.cache_dir is None else {self.cache_dir}
            clean_left_overs(folders)

    def _encode_all(self, encode: Encode, todo: list[_Group], *, wanted: int, workers: int, progress: bool) -> None:
        bytes_each = self._mean_bytes([entry for group in todo for entry in group.wanted])
        with (
            progress_bar("caching latents", "image", total=wanted, shown=progress) as bar,
            CacheWriter("latents", total=wanted, bytes_each=bytes_each, on_written=bar.update) as writer,
            prefetch(self._read_group, todo, workers=max(workers, 1), depth=max(workers, 1) + 1) as found,
        ):
            for source in found:
                for entry, tensors in self._encode_group(encode, source):
                    if entry in source.group.wanted:
                        writer.submit(partial(self._commit, entry, source.origins[entry], tensors))

    def _read_group(self, group: _Group) -> _Source:
        origins = {entry: self._origin(entry) for entry in group.entries}
        pictures = [load_picture(entry.item) for entry in group.entries]
        masks = {entry: picture.mask for entry, picture in zip(group.entries, pictures, strict=True)}
        return _Source(group, normalized_pixels([picture.pixels for picture in pictures]), masks, origins)

    def _origin(self, entry: LatentEntry) -> _Origin:
        """Asked for before anything is decoded: a file that is replaced in between counts as changed at the next start."""
        asked = self._entries.asked(entry)
        identities = {name: self._identify(path) for name, path in sources(entry).items()}
        return _Origin(identities, source_stamps(asked.sources))

    def _encode_group(self, encode: Encode, source: _Source) -> Iterator[tuple[LatentEntry, dict[str, Tensor]]]:
        """Each entry with its tensors. Mirrored images go in a batch of their own, so that switching flip_aug on leaves the
        other latents as they are."""
        entries, pixels = source.group.entries, source.pixels  # (B, 3, H, W)
        found = {entry: {LATENTS: latents} for entry, latents in self._encode_pixels(encode, entries, pixels)}
        flips = [position for position, entry in enumerate(entries) if entry.flip]
        if flips:
            mirrored = tuple(entries[position] for position in flips)
            for entry, latents in self._encode_pixels(encode, mirrored, pixels[flips][..., ::-1]):
                found[entry][FLIPPED] = latents
        for entry, tensors in found.items():
            yield entry, {**tensors, **_mask_tensor(entry, source.masks[entry])}

    def _encode_pixels(
        self, encode: Encode, entries: tuple[LatentEntry, ...], pixels: np.ndarray
    ) -> list[tuple[LatentEntry, Tensor]]:
        import numpy as np
        import torch

        latents = encode(torch.from_numpy(np.ascontiguousarray(pixels)), [entry.item.latent_seed for entry in entries])
        latents = latents.detach().to(device="cpu", dtype=getattr(torch, self.recipe.dtype))
        if latents.shape[0] != len(entries):
            raise ValueError(f"the encoder gave {latents.shape[0]} latents for {len(entries)} images")
        # clones, no views: an image that is kept must not hold its whole group in memory
        found = [(entry, one.clone()) for entry, one in zip(entries, latents, strict=True)]
        bad = [entry.item.path for entry, one in found if not bool(torch.isfinite(one).all())]
        if bad:
            raise DatasetError(*(_not_finite(path, self.recipe.dtype) for path in bad))
        return found

    def _commit(self, entry: LatentEntry, origin: _Origin, tensors: dict[str, Tensor]) -> None:
        asked = self._entries.asked(entry)
        if not self.on_disk:
            self._memory[asked.path] = tensors
            return
        ingredients = self._entries.ingredients(entry.item)
        written = write_cache_file(Path(asked.path), tensors, ingredients=ingredients, sources=origin.identities)
        self.check.note_written(asked, origin.stamps, written=written)

    def _share(self, entries: Sequence[LatentEntry], gather: Gather | None, *, processes: int) -> None:
        paths = map(self._entries.path, entries)
        own = {path: self._memory[path] for path in paths if path in self._memory}
        for path, tensors in shared(own, gather, processes=processes, round_bytes=self.round_bytes):
            self._memory.setdefault(path, tensors)

    # what another program made

    def _read_foreign(self, read: ReadForeign, entry: LatentEntry) -> tuple[_Origin, dict[str, Tensor] | str]:
        origin = self._origin(entry)
        names = tuple(name for name in entry.tensors if name != MASK)
        tensors = read(entry.item, names)
        return origin, tensors if isinstance(tensors, str) else self._fitting(entry, names, tensors)

    def _fitting(self, entry: LatentEntry, names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | str:
        """The tensors as an entry has them, or why they cannot be one."""
        import torch

        dtype = getattr(torch, self.recipe.dtype)
        shape = (self.recipe.channels, *self._entries.latent_hw(entry.item))
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        if reason := misfit(cast, dict.fromkeys(names, shape)):
            return reason
        mask = load_picture(entry.item).mask if entry.item.is_masked else None
        return {**{name: cast[name] for name in names}, **_mask_tensor(entry, mask)}

    def _finish_adoption(self, own: Sequence[LatentEntry], adoption: Adoption, gather: Gather | None, *, processes: int) -> None:
        self._forget()
        self._notes.save()
        if not self.on_disk and processes > 1:
            self._share(own, gather, processes=processes)
        adoption.report("latent", gather=gather if processes > 1 else None)


def _mask_batch(masks: Column, flipped: Sequence[bool]) -> Tensor:
    """Masks (h, w) of some items of a batch, as they are stored -> (B, 1, h, w), ones for the other items."""
    import torch

    if len(masks.entries) == len(flipped):
        batch = masks.tensor
    else:
        batch = torch.ones((len(flipped), *masks.tensor.shape[1:]))
        batch[masks.entries] = masks.tensor
    mirrored = [number for number in masks.entries if flipped[number]]
    if mirrored:
        batch[mirrored] = batch[mirrored].flip(-1)
    return batch[:, None]


def _mask_tensor(entry: LatentEntry, mask: np.ndarray | None) -> dict[str, Tensor]:
    import torch

    if mask is None:
        if entry.item.is_masked:
            raise ValueError(f"{entry.item.path} has a mask, but none was made of it")
        return {}
    return {MASK: torch.from_numpy(mask.copy())}


def _not_finite(path: Path, dtype: str) -> str:
    return (
        f"the VAE gives values that are not finite for {path}: look at the image (remove it if it is damaged) or, if it is "
        f"fine, at the VAE's precision ({dtype}): --no_half_vae encodes in float32"
    )
