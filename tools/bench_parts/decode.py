"""From an image file to the pixels that are trained, against Pillow's own fast way to the same size."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from library.dataset.buckets import Buckets
from library.dataset.images import load_picture
from library.dataset.items import DatasetSettings, Item, SubsetSettings
from tools.bench_parts.figures import Figure, alternate, stopwatch

AS_FAST = 1.0  # target: Pillow's time / ours
FILTERS = {  # Pillow's default with the target, and for information its fastest, which takes or leaves whole pixels
    "BICUBIC": (Image.Resampling.BICUBIC, AS_FAST),
    "BOX": (Image.Resampling.BOX, None),
}
REDUCING_GAP = 2.0  # as Image.thumbnail() has it: whole factors first, where that leaves at least twice the goal


@dataclass(frozen=True, slots=True)
class Case:
    suffix: str
    size_wh: tuple[int, int]
    pairs: int  # that a repeat measures


CASES = (
    Case("jpg", (4000, 3000), 5),
    Case("jpg", (1600, 1200), 10),
    Case("png", (4000, 3000), 1),
    Case("png", (1600, 1200), 4),
    Case("webp", (4000, 3000), 1),
    Case("webp", (1600, 1200), 4),
)


def measure(repeats: int, *, cases: Sequence[Case] = CASES, resolution: int = 1024) -> list[Figure]:
    """One image of each kind, decoded, resized and cropped for a bucket; one core, as each thread of the loader does it."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return [figure for case in cases for figure in compared(case, Path(folder), resolution=resolution, repeats=repeats)]
    finally:
        cv2.setNumThreads(threads)


def compared(case: Case, folder: Path, *, resolution: int, repeats: int) -> list[Figure]:
    item = make_item(case, folder, resolution=resolution)
    width, height = case.size_wh
    figures = []
    for name, (filtering, target) in FILTERS.items():
        pillow, ours = stopwatch(partial(pillow_pixels, item, filtering)), stopwatch(partial(load_picture, item))
        pairs = alternate(pillow, ours, repeats=repeats * case.pairs)
        figures.append(
            Figure(
                name=f"decode: {case.suffix} {width}x{height}, Pillow {name} / ours",
                value=pairs.ratio,
                unit="x",
                at_least=target,
                how=pairs.described("Pillow", "ours"),
            )
        )
    return figures


def pillow_pixels(item: Item, filtering: Image.Resampling) -> np.ndarray:
    """(H, W, 3) uint8: the same way with nothing but Pillow's own means to be fast."""
    with Image.open(item.path) as file:
        file.draft("RGB", item.resized_wh)
        image = file if file.mode == "RGB" else file.convert("RGB")
        image = image.resize(item.resized_wh, filtering, reducing_gap=REDUCING_GAP)
    (left, top), (width, height) = item.crop_left_top, item.bucket_wh
    return np.asarray(image.crop((left, top, left + width, top + height)))


def make_item(case: Case, folder: Path, *, resolution: int) -> Item:
    """Writes the image and places it in a bucket of about ``resolution`` squared."""
    path = folder / f"{case.size_wh[0]}.{case.suffix}"
    photo(*case.size_wh).save(path, quality=90)
    subset = SubsetSettings(place="benchmark", image_dir=folder)
    square = (resolution, resolution)
    placed = Buckets(
        DatasetSettings(
            place="benchmark", resolution_wh=square, enable_bucket=True, max_bucket_reso=2 * resolution, subsets=(subset,)
        )
    ).place(case.size_wh)
    return Item(
        index=0,
        key="0:0:x",
        path=path,
        caption="",
        dataset_index=0,
        subset=subset,
        repeats=1,
        size_wh=case.size_wh,
        bucket_wh=placed.bucket_wh,
        resized_wh=placed.resized_wh,
        crop_left_top=placed.crop_left_top,
    )


def photo(width: int, height: int) -> Image.Image:
    """Soft shapes with grain: compresses about as well as a photo does."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (max(height // 16, 1), max(width // 16, 1), 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = pixels + rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
