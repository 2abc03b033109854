"""Finding, reading and placing every image before anything is trained: settings -> TrainingSet.

Every file is read to its end here, so that a broken one is found now and not after hours. All bad images and captions are
reported together, or left out with --skip_bad_images.
"""

from __future__ import annotations

import warnings as python_warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from library.dataset.buckets import Buckets, Placement
from library.dataset.folders import (
    caption_warnings,
    folder_problem,
    image_extensions,
    list_images,
    read_caption,
    unread_images_warning,
)
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.dataset.metadata_file import read_metadata
from library.dataset.verify import MAX_PIXELS, read_record
from library.errors import DatasetError

PROBLEMS_SHOWN = 20
LARGE_UPSCALE = 2.0  # beyond this an image trains visibly soft
SKIP_HINT = "mend or remove them, or leave them out with --skip_bad_images"

Size = tuple[int, int]
Progress = Callable[[int, int], None]  # (images read, images in all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One image of one subset, not yet read."""

    dataset_index: int
    subset: SubsetSettings
    key: str
    path: Path
    caption: str
    tags: str | None = None  # see Item


@dataclass(slots=True)
class Findings:
    """What the scan has to say: ``problems`` always stop the run, ``bad`` images and captions may be skipped."""

    problems: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def scan(
    datasets: tuple[DatasetSettings, ...], *, skip_bad_images: bool = False, workers: int = 8, progress: Progress | None = None
) -> TrainingSet:
    """Reads every image with ``workers`` threads and assigns buckets and repeats.

    Raises DatasetError with everything that is wrong: empty folders, unreadable images, captions that are not UTF-8, images
    that no bucket takes. With ``skip_bad_images`` bad images are left out and listed in TrainingSet.skipped.
    """
    findings = Findings()
    with _threads(workers) as pool:
        found = [image for index, dataset in enumerate(datasets) for image in _find_images(index, dataset, pool, findings)]
        sizes = verify_images((image.path for image in found), pool=pool, progress=progress)
    items = _items(datasets, list(_placed(datasets, found, sizes, findings)))
    if not findings.bad or skip_bad_images:
        findings.problems.extend(_nothing_left(datasets, items, findings))
    _raise_problems(findings, skip_bad_images=skip_bad_images)
    settings_warnings = [warning for dataset in datasets for warning in dataset.warnings]
    warnings = (*settings_warnings, *findings.warnings, *_bucket_warnings(datasets, items), *_upscale_warnings(datasets, items))
    return TrainingSet(datasets=datasets, items=tuple(items), skipped=tuple(dict.fromkeys(findings.bad)), warnings=warnings)


def verify_images(paths: Iterable[Path], *, pool: ThreadPoolExecutor, progress: Progress | None = None) -> dict[Path, Size | str]:
    """The upright size of each file, or the sentence that says what is wrong with it; each file is read once."""
    unique = list(dict.fromkeys(paths))
    results: dict[Path, Size | str] = {}
    with python_warnings.catch_warnings():
        python_warnings.filterwarnings("ignore", module=r"PIL\.")  # large or with odd EXIF: fine, or refused below with a reason
        for path, result in zip(unique, pool.map(_size_or_problem, unique), strict=True):
            results[path] = result
            if progress is not None:
                progress(len(results), len(unique))
    return results


def regularised_repeats(images: list[Found]) -> list[int]:
    """Repeats per epoch of each image of one dataset.

    Regularisation images fill up to the number of showings T of the others: they are taken in order until their repeats
    reach T, the rest gets 0; where they do not reach T, each gets one more in order, again and again, until they do.
    """
    repeats = [image.subset.num_repeats for image in images]
    regular = [position for position, image in enumerate(images) if image.subset.is_reg]
    missing = sum(repeats) - sum(repeats[position] for position in regular)
    for position in regular:
        if missing <= 0:
            repeats[position] = 0
        missing -= repeats[position]
    if regular and missing > 0:
        rounds, rest = divmod(missing, len(regular))
        for place, position in enumerate(regular):
            repeats[position] += rounds + (place < rest)
    return repeats


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what is still waiting when the scan is interrupted."""
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _size_or_problem(path: Path) -> Size | str:
    try:
        return read_record(path).size_wh
    except DatasetError as error:
        return str(error)


def _find_images(index: int, dataset: DatasetSettings, pool: ThreadPoolExecutor, findings: Findings) -> Iterator[Found]:
    """The images of one dataset; where two subsets name the same file, the later one has it, as in the reference."""
    extensions = image_extensions()
    by_path: dict[Path, Found] = {}
    replaced = 0
    for number, subset in enumerate(dataset.subsets):
        find = _find_in_folder if subset.metadata_file is None else _find_in_metadata
        for name, path, caption, tags in find(subset, extensions, pool, findings):
            replaced += path in by_path
            key = f"{index}:{number}:{name}"
            by_path[path] = Found(dataset_index=index, subset=subset, key=key, path=path, caption=caption, tags=tags)
    if replaced:
        findings.warnings.append(f"{dataset.place}: {replaced} images are in two subsets: the later subset has them")
    yield from by_path.values()


Named = tuple[str, Path, str, str | None]  # name in the subset, path, caption, tags


def _find_in_folder(
    subset: SubsetSettings, extensions: tuple[str, ...], pool: ThreadPoolExecutor, findings: Findings
) -> Iterator[Named]:
    folder = subset.image_dir
    assert folder is not None
    try:
        images = list_images(folder, extensions)
        if not images:
            findings.problems.append(f"{subset.place}: {folder_problem(folder, extensions)}")
        unread = unread_images_warning(folder, extensions)
    except OSError as error:
        findings.problems.append(f"{subset.place}: {folder} cannot be read: {error.strerror}")
        return
    findings.warnings.extend([unread] if unread and images else [])
    readable: list[Path] = []
    captions: list[str | None] = []
    for image, caption in zip(images, pool.map(lambda image: _caption_or_error(image, subset), images), strict=True):
        if isinstance(caption, DatasetError):
            findings.bad.append(str(caption))
            continue
        readable.append(image)
        captions.append(caption)
        yield image.name, image, (subset.class_tokens or "") if caption is None else caption, None
    findings.warnings.extend(caption_warnings(readable, captions, subset))


def _caption_or_error(image: Path, subset: SubsetSettings) -> str | None | DatasetError:
    try:
        return read_caption(image, subset)
    except DatasetError as error:
        return error


def _find_in_metadata(
    subset: SubsetSettings, extensions: tuple[str, ...], pool: ThreadPoolExecutor, findings: Findings
) -> Iterator[Named]:
    try:
        entries, problems = read_metadata(subset, extensions)
    except DatasetError as error:
        findings.problems.append(f"{subset.place}: {error}")
        return
    findings.bad.extend(problems)
    without_text = [entry.key for entry in entries if not entry.caption]
    if without_text:
        findings.warnings.append(
            f"{subset.place}: {len(without_text)} images have neither caption nor tags (such as {without_text[0]}): "
            "they train with an empty caption"
        )
    for entry in entries:
        yield entry.key, entry.path, entry.caption, entry.tags


def _placed(
    datasets: tuple[DatasetSettings, ...], found: list[Found], sizes: dict[Path, Size | str], findings: Findings
) -> Iterator[tuple[Found, Size, Placement]]:
    """The images that can be trained, each with its size and its place in a bucket."""
    buckets = [Buckets(dataset) for dataset in datasets]
    placements: dict[tuple[int, Size], Placement | str] = {}  # few sizes, many images
    for image in found:
        size = sizes[image.path]
        if isinstance(size, str):
            findings.bad.append(size)
            continue
        known = (image.dataset_index, size)
        if known not in placements:
            placements[known] = _placement_or_problem(buckets[image.dataset_index], size)
        placement = placements[known]
        if isinstance(placement, str):
            findings.bad.append(f"{image.path} {placement}")
        else:
            yield image, size, placement


def _placement_or_problem(buckets: Buckets, size: Size) -> Placement | str:
    try:
        placement = buckets.place(size)
    except DatasetError as error:
        return str(error)
    width, height = placement.resized_wh
    if width * height > MAX_PIXELS:
        bucket = f"{placement.bucket_wh[0]}x{placement.bucket_wh[1]}"
        return f"is too narrow ({size[0]}x{size[1]}): covering its bucket {bucket} would take {width:,}x{height:,} px; crop it"
    return placement


def _items(datasets: tuple[DatasetSettings, ...], placed: list[tuple[Found, Size, Placement]]) -> list[Item]:
    by_dataset: dict[int, list[tuple[Found, Size, Placement]]] = defaultdict(list)
    for entry in placed:
        by_dataset[entry[0].dataset_index].append(entry)
    items: list[Item] = []
    for index, dataset in enumerate(datasets):
        entries = by_dataset[index]
        repeats = regularised_repeats([image for image, _, _ in entries])
        for (image, size, placement), count in zip(entries, repeats, strict=True):
            if count > 0:
                items.append(_item(len(items), image, size, placement, repeats=count, is_bucketed=dataset.enable_bucket))
    return items


def _item(index: int, image: Found, size: Size, placement: Placement, *, repeats: int, is_bucketed: bool) -> Item:
    return Item(
        index=index,
        key=image.key,
        path=image.path,
        caption=image.caption,
        tags=image.tags,
        dataset_index=image.dataset_index,
        subset=image.subset,
        repeats=repeats,
        size_wh=size,
        bucket_wh=placement.bucket_wh,
        resized_wh=placement.resized_wh,
        crop_left_top=placement.crop_left_top,
        is_bucketed=is_bucketed,
    )


def _nothing_left(datasets: tuple[DatasetSettings, ...], items: list[Item], findings: Findings) -> Iterator[str]:
    """Datasets without a single item, where no other problem has said so."""
    trained = {item.dataset_index for item in items}
    for index, dataset in enumerate(datasets):
        if index in trained or findings.problems:
            continue
        if all(subset.is_reg for subset in dataset.subsets):
            yield f"{dataset.place} has regularisation images (is_reg) only: add the images to train"
        else:
            yield f"{dataset.place}: none of its images can be trained"


def _raise_problems(findings: Findings, *, skip_bad_images: bool) -> None:
    bad = list(dict.fromkeys(findings.bad))  # one file may be in several datasets
    if not findings.problems and (skip_bad_images or not bad):
        return
    problems = [*findings.problems, *bad[:PROBLEMS_SHOWN]]
    if len(bad) > PROBLEMS_SHOWN:
        problems.append(f"and {len(bad) - PROBLEMS_SHOWN:,} more")
    if bad and not skip_bad_images:
        problems.append(f"{len(bad):,} bad image(s) or caption(s): {SKIP_HINT}")
    raise DatasetError(*problems)


def _bucket_warnings(datasets: tuple[DatasetSettings, ...], items: list[Item]) -> Iterator[str]:
    entries: Counter[tuple[int, Size]] = Counter()
    for item in items:
        entries[item.dataset_index, item.bucket_wh] += item.repeats
    for index, dataset in enumerate(datasets):
        counts = {bucket: count for (owner, bucket), count in sorted(entries.items()) if owner == index}
        small = [f"{width}x{height} ({count})" for (width, height), count in counts.items() if count < dataset.batch_size]
        if small:
            shown = ", ".join(small[:5]) + (" ..." if len(small) > 5 else "")
            yield (
                f"{dataset.place}: {len(small)} of {len(counts)} buckets have fewer images (with repeats) than batch_size "
                f"{dataset.batch_size}, so their batches are smaller: {shown}"
            )


def _upscale_warnings(datasets: tuple[DatasetSettings, ...], items: list[Item]) -> Iterator[str]:
    for index, dataset in enumerate(datasets):
        enlarged = [item for item in items if item.dataset_index == index and _scale(item) > LARGE_UPSCALE]
        if enlarged:
            worst = max(enlarged, key=_scale)
            yield (
                f"{dataset.place}: {len(enlarged)} images are enlarged more than {LARGE_UPSCALE:g}x and will train blurred "
                f"(such as {worst.path.name}, {_scale(worst):.1f}x): use larger ones, a lower resolution or bucket_no_upscale"
            )


def _scale(item: Item) -> float:
    return max(item.resized_wh[0] / item.size_wh[0], item.resized_wh[1] / item.size_wh[1])
