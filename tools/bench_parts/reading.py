"""Reading cached batches: against reading the same files whole, and the share of a step that waits for them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from library.anima.text import AnimaConditioning
from library.dataset.caches.latent_cache import LatentCache, LatentRecipe
from library.dataset.caches.text_cache import TextCache, TextRecipe
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.dataset.loader import BatchSource
from tools.bench_parts.figures import Figure, alternate

IMAGES, BATCH, WORKERS = 400, 4, 2
SIDE_PX = 512  # latents of 64x64
TOKENS, WIDTH = 80, 1024  # of a caption's conditioning
STEP_S, STEPS = 0.1, 30
RATE, WAITING_PERCENT = 0.6, 2.0  # targets


@dataclass(frozen=True, slots=True)
class CachedSet:
    """A training set whose cache files are there."""

    training_set: TrainingSet
    folder: Path

    def source(self) -> BatchSource:
        """With caches that have read nothing yet."""
        latents = LatentCache(self.training_set, LatentRecipe(arch="bench", vae_fingerprint="-", dtype="bfloat16"), on_disk=True)
        recipe = TextRecipe(arch="bench", encoder_fingerprint="-", dtype="bfloat16")
        texts = TextCache(self.training_set, recipe, conditioning_type=AnimaConditioning, on_disk=True)
        return BatchSource(self.training_set, seed=1, latent_cache=latents, text_cache=texts)

    def files(self) -> list[str]:
        """The cache files that an epoch reads."""
        return [str(path) for path in sorted(self.folder.glob("*.safetensors")) if "prompts" not in path.name]


def measure(repeats: int, *, images: int = IMAGES, side_px: int = SIDE_PX) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        cached = make_cached_set(Path(folder), images=images, side_px=side_px)
        rates = [reading_rate(cached, repeats, state="in memory")]
        if hasattr(os, "posix_fadvise"):
            rates.append(reading_rate(cached, repeats, state="on disk"))
        return [*rates, waiting_share(cached)]


def reading_rate(cached: CachedSet, repeats: int, *, state: str) -> Figure:
    """An epoch through caches that have read nothing yet, over reading its files one after the other. ``state``: "in memory",
    where the system keeps all files, as it does those of a small set, or "on disk", where it keeps none, as of a large set."""
    files, size = cached.files(), sum(os.path.getsize(file) for file in cached.files())  # noqa: PTH202
    prepare = (lambda: forget(files)) if state == "on disk" else (lambda: None)

    def whole() -> float:
        prepare()
        return timed(lambda: read_whole(files))

    def batches() -> float:
        source = cached.source()
        prepare()
        return timed(lambda: read_epoch(source, len(cached.training_set.items) // BATCH))

    pairs = alternate(whole, batches, repeats=3 * repeats)
    how = (
        f"{len(files)} files, {size / 2**20:.0f} MiB, batches of {BATCH} in {WORKERS} threads, checksums compared; "
        f"{pairs.described('whole files', 'batches')}"
    )
    return Figure(name=f"data: reading batches / whole files {state}", value=pairs.ratio, unit="x", at_least=RATE, how=how)


def waiting_share(cached: CachedSet) -> Figure:
    """Of steps of ``STEP_S`` that do nothing else."""
    with cached.source().batches(1, 0, workers=WORKERS) as batches:
        next(batches)
        before = batches.waited_s
        for _ in range(STEPS):
            time.sleep(STEP_S)
            next(batches)
        waited = batches.waited_s - before
    percent = 100 * waited / (STEPS * STEP_S)
    how = f"{STEPS} steps of {1000 * STEP_S:.0f} ms, batches of {BATCH}, files read for the first time"
    return Figure(name="data: waiting for batches", value=percent, unit="%", at_most=WAITING_PERCENT, how=how)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_whole(files: list[str]) -> int:
    total = 0
    for name in files:
        with open(name, "rb") as file:  # noqa: PTH123  # as plain as it gets
            total += len(file.read())
    return total


def read_epoch(source: BatchSource, count: int) -> None:
    with source.batches(1, 0, workers=WORKERS) as batches:
        for _ in range(count):
            next(batches)


def forget(files: list[str]) -> None:
    """Takes files out of the memory that the system keeps of them."""
    for name in files:
        handle = os.open(name, os.O_RDWR)
        os.fsync(handle)  # what is not on the disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def make_cached_set(folder: Path, *, images: int, side_px: int) -> CachedSet:
    from PIL import Image

    subset = SubsetSettings(place="bench", image_dir=folder)
    wh = (side_px, side_px)
    Image.new("RGB", wh).save(folder / "0000.png")
    picture = (folder / "0000.png").read_bytes()
    items = []
    for index in range(images):
        path = folder / f"{index:04}.png"
        path.write_bytes(picture)
        items.append(Item(index=index, key=f"0:0:{path.name}", path=path, caption=f"picture {index}, " + "a word, " * 30,
                          dataset_index=0, subset=subset, repeats=1, size_wh=wh, bucket_wh=wh, resized_wh=wh,
                          crop_left_top=(0, 0)))  # fmt: skip
    settings = DatasetSettings(place="bench", resolution_wh=wh, batch_size=BATCH, subsets=(subset,))
    cached = CachedSet(TrainingSet(datasets=(settings,), items=tuple(items)), folder)
    source = cached.source()
    assert source.latent_cache is not None
    assert source.text_cache is not None
    with files_need_not_last():
        source.latent_cache.fill(noise_latents, batch_size=BATCH, workers=WORKERS, progress=False)
        source.text_cache.fill(noise_text, batch_size=BATCH, progress=False)
    return cached


@contextmanager
def files_need_not_last() -> Iterator[None]:
    """A power cut may take the benchmark's files: there is no need to wait for the disk at each of them."""
    with mock.patch.object(os, "fsync"):
        yield


def noise_latents(pixels: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    return torch.randn(pixels.shape[0], 16, pixels.shape[2] // 8, pixels.shape[3] // 8)  # (B, 16, h, w)


def noise_text(texts: list[str]) -> AnimaConditioning:
    mask = torch.ones(len(texts), TOKENS, dtype=torch.bool)
    embeds = torch.randn(len(texts), TOKENS, WIDTH).to(torch.bfloat16)
    return AnimaConditioning(embeds, mask, torch.ones(len(texts), TOKENS, dtype=torch.int64), mask)
