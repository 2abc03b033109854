"""Starting with 100,000 small images whose caches are there: seconds to the first batch, and memory for each image."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from unittest import mock

import torch

from library.anima.text import AnimaConditioning
from tools.bench_parts.figures import Figure
from tools.bench_parts.processes import checked, run_measured
from tools.bench_parts.tiny_run import CACHED_ON_DISK, TinyRun, make_tiny_run

IMAGES, FOLDERS = 100_000, 4
SIDE_PX = 64
START_S, BYTES_PER_IMAGE = 30.0, 1024  # targets
DIFFERENT_PICTURES = 200  # files repeat their bytes; names, captions and caches are each image's own
WORDS = ("cat", "dog", "tree", "lake", "boat", "cloud", "stone", "river", "bird", "light", "morning", "quiet", "old", "red")
# A start up to the first batch, in a process of its own, with the memory that it leaves behind if asked for.
START = """
import json, sys, time, tracemalloc
began = time.perf_counter()
traced, flags = sys.argv[1] == "traced", sys.argv[2:]
if traced:
    tracemalloc.start()
from library.anima.architecture import ANIMA
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.plan import plan_lines, NetworkSize
from library.training.preflight import check_run, worker_count
options = read_options(AnimaTrainOptions, flags)
before = tracemalloc.get_traced_memory()[0] if traced else 0
run = check_run(options, ANIMA)
complete = run.latent_cache.state().is_complete and run.text_cache.state().is_complete
plan_lines(run, NetworkSize(0, 0, 0))
planned = time.perf_counter() - began
held = tracemalloc.get_traced_memory()[0] - before if traced else 0
items = run.training_set.items
names = sum(sys.getsizeof(str(item.path)) + sys.getsizeof(item.path) + sys.getsizeof(item.caption) for item in items)
from library.anima.text import AnimaConditioning
from library.dataset.loader import BatchSource
run.text_cache.conditioning_type = AnimaConditioning
source = BatchSource(run.training_set, seed=1, latent_cache=run.latent_cache, text_cache=run.text_cache)
with source.batches(1, 0, workers=worker_count(options)) as batches:
    _, _, batch = next(batches)
print(json.dumps({"images": len(items), "complete": complete, "planned_s": planned,
                  "batch_s": time.perf_counter() - began, "held": held, "names": names, "size": batch.global_size}))
"""


def measure(repeats: int, *, images: int = IMAGES) -> list[Figure]:
    """``repeats`` is not used: one start takes long enough, and the set longer still."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_big_set(Path(folder), images=images)
        start(run)  # remembers what it found out about each file
        quick, traced = start(run), start(run, traced=True)
    per_image = (traced["held"] - traced["names"]) / traced["images"]
    how = f"{quick['images']:,} images, caches complete, a start before; checks and plan {quick['planned_s']:.1f} s of it"
    memory = f"tracemalloc after the checks, without the paths and captions themselves ({traced['names'] / images:.0f} B each)"
    return [
        Figure(name="data: start to first batch, warm", value=quick["batch_s"], unit="s", at_most=START_S, how=how),
        Figure(name="data: memory of an image", value=per_image, unit="B", at_most=BYTES_PER_IMAGE, how=memory),
    ]


def start(run: TinyRun, *, traced: bool = False) -> dict[str, float]:
    """What one start in a process of its own says of itself. Raises RuntimeError when its caches were not complete."""
    command = [sys.executable, "-c", START, "traced" if traced else "timed", *run.flags, *CACHED_ON_DISK, "--max_train_steps=1"]
    found = json.loads(checked(run_measured(command)).output.strip().splitlines()[-1])
    if not found["complete"]:
        raise RuntimeError(f"the caches of the measured start were not complete: {found}")
    return found


def make_big_set(folder: Path, *, images: int) -> TinyRun:
    """Images with captions in ``FOLDERS`` folders, and their caches with contents that no model made."""
    run = make_tiny_run(folder, pictures=1, resolution=SIDE_PX, batch_size=4)
    write_pictures(folder / "set", images)
    dataset = folder / "big.toml"
    subsets = "".join(f'\n[[datasets.subsets]]\nimage_dir = "{path.as_posix()}"\n' for path in sorted((folder / "set").iterdir()))
    text = f'[general]\nresolution = {SIDE_PX}\ncaption_extension = ".txt"\n\n[[datasets]]\nbatch_size = 4\n{subsets}'
    dataset.write_text(text, encoding="utf-8")
    flags = tuple(f"--dataset_config={dataset}" if flag.startswith("--dataset_config") else flag for flag in run.flags)
    run = replace(run, pictures=images, flags=flags)
    fill_caches(run)
    return run


def write_pictures(folder: Path, images: int) -> None:
    from PIL import Image

    rng = random.Random(0)
    contents = []
    for _ in range(min(DIFFERENT_PICTURES, images)):
        file = BytesIO()
        Image.frombytes("RGB", (8, 8), rng.randbytes(8 * 8 * 3)).resize((SIDE_PX, SIDE_PX)).save(file, "PNG")
        contents.append(file.getvalue())
    for number in range(images):
        place = folder / f"part_{number % FOLDERS}"
        if number < FOLDERS:
            place.mkdir(parents=True)
        (place / f"picture_{number:06d}.png").write_bytes(contents[number % len(contents)])
        caption = ", ".join([f"number {number}", *rng.choices(WORDS, k=12)])
        (place / f"picture_{number:06d}.txt").write_text(caption, encoding="utf-8")


def fill_caches(run: TinyRun) -> None:
    checked_run = run.checked(*CACHED_ON_DISK, "--max_train_steps=1")
    with files_need_not_last():
        checked_run.latent_cache.fill(made_up_latents, batch_size=64, workers=2, progress=False)
        checked_run.text_cache.fill(made_up_text, batch_size=64, progress=False)


@contextmanager
def files_need_not_last() -> Iterator[None]:
    """A power cut may take the benchmark's files: waiting for the disk at each of them would take most of an hour."""
    with mock.patch.object(os, "fsync"):
        yield


def made_up_latents(pixels: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    return torch.zeros(pixels.shape[0], 16, pixels.shape[2] // 8, pixels.shape[3] // 8)  # (B, 16, h, w)


def made_up_text(texts: list[str]) -> AnimaConditioning:
    """A few rows of a narrow text encoder: the number of files is what counts here, not their size."""
    count, rows, width = len(texts), 4, 64
    ones = torch.ones(count, rows, dtype=torch.bool)
    return AnimaConditioning(torch.zeros(count, rows, width), ones, torch.zeros(count, rows, dtype=torch.int32), ones)
