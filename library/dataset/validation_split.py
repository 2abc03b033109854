"""Which images validate, and what is left of their subsets' settings once nothing is left to chance.

An image that validates is never trained: not in its own dataset, and not in any other that names the same file.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.dataset.find_images import Found
from library.dataset.items import DatasetSettings, SubsetSettings
from library.randomness import derive_seed


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained and what validates, each in the order of the images. An image may be neither."""

    trained: list[Found]
    validation: list[Found]
    warnings: list[str]


def without_chance(subset: SubsetSettings) -> SubsetSettings:
    """The settings of validation images: each is shown once, always in the same way.

    Flips, colour changes, random crops and every kind of caption dropout are off, and tags stay in order. Where training would
    have handled the tags (shuffled, dropped or warmed them up), ``tags_joined`` is set: the caption is still cut at
    keep_tokens_separator and at commas and joined with ", ", because that is the form which the network sees in training.
    Wildcards stay: variant 0 of the caption is used.
    """
    tags_handled = subset.shuffle_caption or subset.caption_tag_dropout_rate > 0 or subset.token_warmup_step > 0
    return replace(
        subset,
        num_repeats=1,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_min=1,
        token_warmup_step=0.0,
        tags_joined=subset.tags_joined or tags_handled,
    )


def split_images(datasets: Sequence[DatasetSettings], images: Sequence[Found], *, seed: int | None) -> Split:
    """Divides the images of all datasets. ``seed`` (--seed) counts for datasets without a validation_seed.

    Regularisation images never validate; those whose file validates elsewhere are not trained either.
    """
    chosen = set(_validating(datasets, images, seed=seed))
    if not chosen:
        return Split(list(images), [], list(_nothing_validates(datasets)))
    real_path = RealPaths()
    held_out = {real_path(images[position].path) for position in chosen}
    trained: list[Found] = []
    dropped: Counter[int] = Counter()
    for position, image in enumerate(images):
        if position in chosen:
            continue
        if real_path(image.path) in held_out:
            dropped[image.dataset_index] += 1
        else:
            trained.append(image)
    warnings = [
        f"{datasets[index].place}: {count} images validate elsewhere in this run and are therefore not trained here"
        for index, count in sorted(dropped.items())
    ]
    return Split(trained, [images[position] for position in sorted(chosen)], warnings)


def validation_count(images: int, share: float) -> int:
    """How many of a subset's images validate: as in kohya-ss/sd-scripts ceil(n * (1 - share)) are trained, but where 0 < share
    < 1 at least one validates and at least one is trained, if there are two."""
    if share <= 0:
        return 0
    if share >= 1:
        return images
    trained = math.ceil(images * (1 - share))
    return images - max(1, min(trained, images - 1)) if images else 0


def chosen_for_validation(paths: Sequence[str], share: float, *, seed: int) -> set[str]:
    """Those of one subset's images that validate: each file name has its number, and the smallest are chosen.

    So an image that is added, removed or renamed changes the side of at most one other, and moving the folder of none. The
    reference shuffles the sorted paths, which moves many.
    """

    def number(path: str) -> tuple[int, str]:
        return derive_seed("validation", seed, os.path.basename(path)), path  # noqa: PTH119  # for each of very many images

    return set(heapq.nsmallest(validation_count(len(paths), share), paths, key=number))


class RealPaths:
    """The path that a file really has, links resolved; folders are resolved only once."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def __call__(self, path: Path) -> str:
        if path.is_symlink():
            return os.path.normcase(path.resolve())
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = os.fspath(Path(folder).resolve())
        return os.path.normcase(os.path.join(self._folders[folder], name))  # noqa: PTH118  # for each of very many images


def _validating(datasets: Sequence[DatasetSettings], images: Sequence[Found], *, seed: int | None) -> Iterator[int]:
    by_subset: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, image in enumerate(images):
        by_subset[image.dataset_index, image.subset_index].append(position)
    for (dataset_index, _), positions in by_subset.items():
        dataset, subset = datasets[dataset_index], images[positions[0]].subset
        share = 1.0 if subset.is_validation else dataset.validation_split
        if subset.is_reg or share <= 0:
            continue
        seeds = (dataset.validation_seed, seed, 0)
        paths = {images[position].file: position for position in positions}
        chosen = chosen_for_validation(list(paths), share, seed=next(value for value in seeds if value is not None))
        yield from (paths[path] for path in chosen)


def _nothing_validates(datasets: Sequence[DatasetSettings]) -> Iterator[str]:
    for dataset in datasets:
        if dataset.validation_split > 0:
            yield (
                f"{dataset.place}: validation_split is {dataset.validation_split:g}, but nothing validates: a subset of a single "
                "image is trained, and regularisation images never validate; add images, or a subset with is_validation = true"
            )
