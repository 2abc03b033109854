"""Pictures, a small VAE and a small text encoder for the cache and loader tests; also a script that fills a cache on its own.

``python -m tests.library.dataset.caches.cache_parts FOLDER KIND RANK PROCESSES DELAY_S`` caches the pictures of FOLDER on disk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.dataset import image_records
from library.dataset.caches import notes as cache_notes
from library.dataset.caches.latent_cache import LatentCache, LatentRecipe
from library.dataset.caches.text_cache import TextCache, TextRecipe
from library.dataset.image_records import sha256_of
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet

SIZES_WH = ((64, 64), (96, 64))
LATENT_RECIPE = LatentRecipe(arch="tiny", vae_fingerprint="v1", dtype="bfloat16", channels=4)
TEXT_RECIPE = TextRecipe(arch="tiny", encoder_fingerprint="e1", dtype="bfloat16", settings={"max_tokens": 77})
NAMES = ("a.png", "b.PNG", "blaue Blüte.png", "d.png", "e.png", "f.png", "g.png", "h.png")


def draw(path: Path, size_wh: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size_wh[1], size_wh[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def make_item(path: Path, index: int, subset: SubsetSettings, **changes: Any) -> Item:
    with Image.open(path) as image:
        size = image.size
    item = Item(
        index=index, key=f"0:0:{path.name}", path=path, caption=f"picture {index}, red, round, on a table", dataset_index=0,
        subset=subset, repeats=subset.num_repeats, size_wh=size, bucket_wh=size, resized_wh=size, crop_left_top=(0, 0),
    )  # fmt: skip
    return replace(item, **changes)


def make_training_set(folder: Path, count: int = 5, *, batch_size: int = 2, **subset_changes: Any) -> TrainingSet:
    """``count`` noise pictures of two sizes; drawn when they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    subset = SubsetSettings(place="test", image_dir=folder, **subset_changes)
    items = []
    for index in range(count):
        path = folder / NAMES[index]
        if not path.exists():
            draw(path, SIZES_WH[index % 2], seed=index)
        items.append(make_item(path, index, subset))
    settings = DatasetSettings(place="test", resolution_wh=(64, 64), batch_size=batch_size, subsets=(subset,))
    return TrainingSet(datasets=(settings,), items=tuple(items))


def changed(training_set: TrainingSet, index: int, **changes: Any) -> TrainingSet:
    items = list(training_set.items)
    items[index] = replace(items[index], **changes)
    return replace(training_set, items=tuple(items))


def with_masks(training_set: TrainingSet, folder: str = "masks") -> TrainingSet:
    """Every image with a noise picture of its size as its mask; drawn when it is not there yet."""
    items = []
    for item in training_set.items:
        path = item.path.parent / folder / item.path.name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            draw(path, item.size_wh, seed=1000 + item.index)
        items.append(replace(item, mask_path=path))
    return replace(training_set, items=tuple(items))


@dataclass
class TinyVae:
    """(B, 3, H, W) -> (B, 4, H/8, W/8): a strided convolution with fixed weights. Notes the batches and seeds it has seen."""

    delay_s: float = 0.0
    batches: list[Tensor] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __call__(self, pixels: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        self.batches.append(pixels.clone())
        self.seeds += seeds
        time.sleep(self.delay_s)
        weight = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8)
        return torch.nn.functional.conv2d(pixels, weight, stride=8) / 8


@dataclass(frozen=True, eq=False)
class TinyConditioning:
    """embeds (B, T, 2) bfloat16, mask (B, T) bool: True for the caption's own rows."""

    embeds: Tensor
    mask: Tensor

    def to(self, device: Any, *, non_blocking: bool = False) -> TinyConditioning:
        return TinyConditioning(self.embeds.to(device), self.mask.to(device))

    def pin_memory(self) -> TinyConditioning:
        return TinyConditioning(self.embeds.pin_memory(), self.mask.pin_memory())

    def split(self) -> list[TinyConditioning]:
        return [TinyConditioning(e[None], m[None]) for e, m in zip(self.embeds, self.mask, strict=True)]

    def cache_tensors(self) -> dict[str, Tensor]:
        rows = int(self.mask.sum())
        return {"embeds": self.embeds[0, :rows], "mask": self.mask[0, :rows]}

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> TinyConditioning:
        return cls(tensors["embeds"], tensors["mask"])

    @classmethod
    def stack(cls, parts: Sequence[TinyConditioning]) -> TinyConditioning:
        longest = max(part.mask.shape[1] for part in parts)
        pads = [(0, longest - part.mask.shape[1]) for part in parts]
        embeds = [torch.nn.functional.pad(part.embeds, (0, 0, *pad)) for part, pad in zip(parts, pads, strict=True)]
        masks = [torch.nn.functional.pad(part.mask, pad) for part, pad in zip(parts, pads, strict=True)]
        return cls(torch.cat(embeds), torch.cat(masks))


@dataclass
class TinyTextEncoder:
    """One row per character. Notes the captions it has seen."""

    delay_s: float = 0.0
    seen: list[list[str]] = field(default_factory=list)

    def __call__(self, captions: list[str]) -> TinyConditioning:
        self.seen.append(captions)
        time.sleep(self.delay_s)
        return TinyConditioning.stack([self.one(caption) for caption in captions])

    @staticmethod
    def one(caption: str) -> TinyConditioning:
        codes = torch.tensor([ord(letter) for letter in caption], dtype=torch.float32)
        embeds = torch.stack([codes, codes.sin()], dim=-1).to(torch.bfloat16)  # (T, 2)
        return TinyConditioning(embeds[None], torch.ones(1, len(caption), dtype=torch.bool))


def latent_cache(training_set: TrainingSet, *, on_disk: bool = True, **changes: Any) -> LatentCache:
    recipe = replace(
        LATENT_RECIPE, **{name: changes.pop(name) for name in ("vae_fingerprint", "dtype", "arch") if name in changes}
    )
    return LatentCache(training_set, recipe, on_disk=on_disk, **changes)


def text_cache(
    training_set: TrainingSet, *, on_disk: bool = True, recipe: TextRecipe = TEXT_RECIPE, **settings: Any
) -> TextCache:
    return TextCache(training_set, recipe, conditioning_type=TinyConditioning, on_disk=on_disk, **settings)


def mask_of(cache: LatentCache, item: Item, *, flipped: bool = False) -> Tensor | None:
    """(h, w)"""
    _, mask = cache.load_batch([(item, flipped)])
    return None if mask is None else mask[0, 0]


def settle(monkeypatch: Any) -> None:
    """As if every file were older than the steps in which file systems count time."""
    monkeypatch.setattr(cache_notes, "SETTLED_NS", -1)


def watch_hashing(monkeypatch: Any) -> list[Path]:
    """The files whose bytes are hashed from now on."""
    hashed: list[Path] = []

    def watched(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    for module in (image_records,):
        monkeypatch.setattr(module, "sha256_of", watched)
    return hashed


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main() -> None:
    folder, kind, rank, processes, delay_s = sys.argv[1:6]
    share = {"rank": int(rank), "processes": int(processes), "progress": False}
    training_set = make_training_set(Path(folder), len(NAMES), flip_aug=True, shuffle_caption=True)
    print("filling", flush=True)
    if kind == "latents":
        latent_cache(training_set).fill(TinyVae(float(delay_s)), batch_size=2, workers=1, **share)
    else:
        text_cache(training_set, variants=3).fill(TinyTextEncoder(float(delay_s)), batch_size=2, **share)


if __name__ == "__main__":
    main()
