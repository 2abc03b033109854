"""What is allowed of images, masks and buckets, but is perhaps not meant. About images that are used."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from library.dataset.augment import face_of
from library.dataset.image_records import Size
from library.dataset.items import DatasetSettings, Item

LARGE_UPSCALE = 2.0  # beyond this an image trains visibly soft


def item_warnings(
    datasets: tuple[DatasetSettings, ...], trained: Sequence[Item], validation: Sequence[Item], *, processes: int = 1
) -> Iterator[str]:
    """Each a sentence with a count and an example. ``processes``: of the run, which share a batch."""
    yield from _alpha_warnings([*trained, *validation])
    yield from _face_warnings(trained)
    yield from _bucket_warnings(datasets, trained, processes)
    yield from _upscale_warnings(datasets, trained)


def by_subset(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items of each subset that has any, whether they train or validate."""
    subsets: dict[tuple[int, int], list[Item]] = defaultdict(list)
    for item in items:
        subsets[item.dataset_index, item.subset_index].append(item)
    yield from subsets.values()


def _alpha_warnings(items: Sequence[Item]) -> Iterator[str]:
    """Subsets with alpha_mask that train as if they had none."""
    for own in by_subset(item for item in items if item.subset.alpha_mask and item.mask_path is None):
        if not any(item.has_alpha for item in own):
            yield (
                f"{own[0].subset.place}: alpha_mask is on, but none of its images has an alpha channel: all of each picture "
                "counts; use images with transparency (such as RGBA PNG), or conditioning_data_dir"
            )


def _face_warnings(items: Sequence[Item]) -> Iterator[str]:
    for own in by_subset(item for item in items if item.subset.face_crop_aug_range is not None):
        without = [item for item in own if face_of(item) is None]
        if without:
            crops = "cropped at random" if own[0].subset.random_crop else "cropped in the middle"
            yield (
                f"{own[0].subset.place}: face_crop_aug_range is set, but the names of {len(without)} of {len(own)} images (such "
                f"as {without[0].path.name}) tell of no face: these are {crops}; a name must end in _x_y_width_height, the "
                "middle and the sides of the face in pixels"
            )


def _bucket_warnings(datasets: tuple[DatasetSettings, ...], items: Sequence[Item], processes: int) -> Iterator[str]:
    entries: Counter[tuple[int, Size]] = Counter()
    for item in items:
        entries[item.dataset_index, item.bucket_wh] += item.repeats
    for index, dataset in enumerate(datasets):
        counts = {bucket: count for (owner, bucket), count in sorted(entries.items()) if owner == index}
        full = dataset.batch_size * processes
        small = [f"{width}x{height} ({count})" for (width, height), count in counts.items() if count < full]
        if small:
            shown = ", ".join(small[:5]) + (" ..." if len(small) > 5 else "")
            times = f" times {processes} processes" if processes > 1 else ""
            yield (
                f"{dataset.place}: {len(small)} of {len(counts)} buckets have fewer images (with repeats) than batch_size "
                f"{dataset.batch_size}{times}, so their batches are smaller: {shown}"
            )


def _upscale_warnings(datasets: tuple[DatasetSettings, ...], items: Sequence[Item]) -> Iterator[str]:
    for index, dataset in enumerate(datasets):
        enlarged = [item for item in items if item.dataset_index == index and item.scale > LARGE_UPSCALE]
        if enlarged:
            worst = max(enlarged, key=lambda item: item.scale)
            yield (
                f"{dataset.place}: {len(enlarged)} images are enlarged more than {LARGE_UPSCALE:g}x and will train blurred "
                f"(such as {worst.path.name}, {worst.scale:.1f}x): use larger ones, a lower resolution or bucket_no_upscale"
            )
