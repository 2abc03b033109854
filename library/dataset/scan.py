"""Finding, verifying and placing every image before anything is trained: settings -> TrainingSet.

Every file is read to its end here, so that a broken one is found now and not after hours; files that are as an earlier start
found them are not read again. All bad images and captions are reported together, or left out with --skip_bad_images. What is
allowed but perhaps not meant becomes a warning, about the images that are used.
"""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from library.dataset.buckets import Buckets, Placement
from library.dataset.caption_warnings import caption_warnings
from library.dataset.empty_masks import empty_mask_findings
from library.dataset.find_images import Findings, Found, Search, find_all_images
from library.dataset.folders import image_extensions, printable
from library.dataset.image_records import ImageRecord, ImageRecords, Size
from library.dataset.info_file import write_missing_infos
from library.dataset.item_warnings import item_warnings
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.dataset.prefetch import thread_pool
from library.dataset.validation_split import split_images, without_chance
from library.dataset.verify import MAX_PIXELS, Progress, size_text, verify_images
from library.errors import DatasetError

PROBLEMS_SHOWN = 20
LOOKERS = 8  # threads that read captions and compare times of files; it is the disk or the network that they wait for
SKIP_HINT = "mend or remove them, or leave them out with --skip_bad_images"

Results = dict[str, "ImageRecord | str"]  # by path: what a file holds, or what is wrong with it


class Placed(NamedTuple):
    """An image that can be used, and where it goes."""

    image: Found
    record: ImageRecord
    placement: Placement
    is_bucketed: bool


def scan(  # noqa: PLR0913  # all but the datasets have a default
    datasets: tuple[DatasetSettings, ...],
    *,
    skip_bad_images: bool = False,
    workers: int = 8,
    progress: Progress | None = None,
    records: ImageRecords | None = None,
    seed: int | None = None,
    processes: int = 1,
) -> TrainingSet:
    """Decodes new images with ``workers`` threads and assigns buckets, repeats and what validates.

    ``records`` of earlier starts save reading; they are saved even when the scan fails or is interrupted, and where they may be
    written, so are the files of cache_info. None: nothing is remembered. ``seed``: --seed, for the choice of validation images.
    ``processes``: of the run, for the warnings about small batches.

    Raises DatasetError with everything that is wrong: empty folders, unreadable images, captions that are not UTF-8, images
    that no bucket takes, masks that are missing or do not fit. With ``skip_bad_images`` bad images are left out and listed in
    TrainingSet.skipped.
    """
    findings = Findings()
    records = records or ImageRecords(reads=False, writes=False)
    with thread_pool(max(workers, LOOKERS)) as lookers, thread_pool(workers) as readers:
        found, results = _find_and_verify(datasets, findings, records, pools=(lookers, readers), progress=progress)
    trained, validation = _items(datasets, found, results, findings, records=records, seed=seed)
    if not findings.bad or skip_bad_images:
        findings.problems.extend(_nothing_left(datasets, trained, validation, findings))
    _raise_problems(findings, skip_bad_images=skip_bad_images)
    if records.writes and not findings.bad:
        findings.warnings.extend(write_missing_infos(_measured(found, results)))
    settings_warnings = (warning for dataset in datasets for warning in dataset.warnings)
    notices = item_warnings(datasets, trained, validation, processes=processes)
    return TrainingSet(
        datasets=datasets,
        items=tuple(trained),
        validation=tuple(validation),
        skipped=tuple(map(printable, dict.fromkeys(findings.bad))),
        warnings=tuple(map(printable, (*settings_warnings, *findings.warnings, *notices))),
        records=records,
    )


def regularised_repeats(images: Sequence[Found]) -> list[int]:
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


def _find_and_verify(
    datasets: tuple[DatasetSettings, ...],
    findings: Findings,
    records: ImageRecords,
    *,
    pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
    progress: Progress | None,
) -> tuple[list[Found], Results]:
    lookers, readers = pools
    try:
        with _no_garbage_collection():
            found = find_all_images(datasets, Search(image_extensions(), lookers, findings))
        return found, verify_images(_files(found), records, lookers=lookers, readers=readers, progress=progress)
    finally:
        records.save()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A scan makes a million small objects and no cycles: looking through them again and again takes a fifth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _files(found: Iterable[Found]) -> Iterator[str]:
    for image in found:
        yield image.file
        if image.mask_path is not None:
            yield os.fspath(image.mask_path)


def _items(
    datasets: tuple[DatasetSettings, ...],
    found: Sequence[Found],
    results: Results,
    findings: Findings,
    *,
    records: ImageRecords,
    seed: int | None,
) -> tuple[list[Item], list[Item]]:
    """What is trained and what validates; what is wrong with other images, and odd about these, goes into ``findings``."""
    with _no_garbage_collection():
        split = split_images(datasets, found, seed=seed)
        to_train = list(_placed(datasets, split.trained, results, findings))
        to_validate = list(_placed(datasets, split.validation, results, findings))
        to_train = _without_copies(to_train, to_validate, findings)
        trained = _trained_items(datasets, to_train)
        validation = _validation_items(to_validate, start=len(trained))
        findings.warnings.extend(caption_warnings(entry.image for entry in (*to_train, *to_validate)))
    empty_masks, warnings = empty_mask_findings(trained, validation, records)
    findings.problems.extend(empty_masks)
    findings.warnings.extend([*warnings, *split.warnings])
    return trained, validation


def _without_copies(to_train: list[Placed], to_validate: list[Placed], findings: Findings) -> list[Placed]:
    """What is trained, without images whose very bytes validate under another name."""
    validating = {entry.record.sha256: entry.image for entry in to_validate}
    copies = [entry.image for entry in to_train if entry.record.sha256 in validating]
    if not copies:
        return to_train
    original = next(validating[entry.record.sha256] for entry in to_train if entry.image is copies[0])
    findings.warnings.append(
        f"{len(copies)} images have the same bytes as one that validates (such as {copies[0].path} and {original.path}) and are "
        "therefore not trained"
    )
    return [entry for entry in to_train if entry.record.sha256 not in validating]


def _placed(
    datasets: tuple[DatasetSettings, ...], found: Iterable[Found], results: Results, findings: Findings
) -> Iterator[Placed]:
    """The images that can be used, each with its place in a bucket; what is wrong with the others goes into ``findings``."""
    buckets = [Buckets(dataset) for dataset in datasets]
    placements: dict[tuple[int, Size], Placement | str] = {}  # few sizes, many images
    for image in found:
        record = _fitting_record(image, results)
        if isinstance(record, str):
            findings.bad.append(record)
            continue
        known = (image.dataset_index, record.size_wh)
        if known not in placements:
            placements[known] = _placement_or_problem(buckets[image.dataset_index], record.size_wh)
        placement = placements[known]
        if isinstance(placement, str):
            findings.bad.append(f"{image.path} {placement}")
        else:
            yield Placed(image, record, placement, datasets[image.dataset_index].enable_bucket)


def _fitting_record(image: Found, results: Results) -> ImageRecord | str:
    """What the file holds, or why it cannot be used: its own fault, or its mask's."""
    record = results[image.file]
    if isinstance(record, str):
        named_by = image.subset.metadata_file
        return record if named_by is None else f"{named_by}, {image.name}: {record}"
    if image.mask_path is None:
        return record
    mask = results[os.fspath(image.mask_path)]
    if isinstance(mask, str):
        return f"{mask} (it is the mask of {image.path})"
    if mask.size_wh != record.size_wh:
        return (
            f"the mask {image.mask_path} is {size_text(mask.size_wh)}, but its image {image.path} is "
            f"{size_text(record.size_wh)}: a mask must have the size of its image"
        )
    return record


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


def _trained_items(datasets: tuple[DatasetSettings, ...], placed: Iterable[Placed]) -> list[Item]:
    by_dataset: dict[int, list[Placed]] = defaultdict(list)
    for entry in placed:
        by_dataset[entry.image.dataset_index].append(entry)
    items: list[Item] = []
    for index in range(len(datasets)):
        entries = by_dataset[index]
        for entry, repeats in zip(entries, regularised_repeats([entry.image for entry in entries]), strict=True):
            if repeats > 0:
                items.append(_item(len(items), entry, entry.image.subset, repeats=repeats))
    return items


def _validation_items(placed: Iterable[Placed], *, start: int) -> list[Item]:
    fixed: dict[tuple[int, int], SubsetSettings] = {}  # one object for all images of a subset
    items: list[Item] = []
    for entry in placed:
        which = (entry.image.dataset_index, entry.image.subset_index)
        if which not in fixed:
            fixed[which] = without_chance(entry.image.subset)
        items.append(_item(start + len(items), entry, fixed[which], repeats=1))
    return items


def _item(index: int, placed: Placed, subset: SubsetSettings, *, repeats: int) -> Item:
    image, record, placement, is_bucketed = placed
    return Item(
        index=index,
        key=f"{image.dataset_index}:{image.subset_index}:{image.name}",
        path=image.path,
        caption=image.caption,
        tags=image.tags,
        mask_path=image.mask_path,
        custom_attributes=image.custom_attributes,
        dataset_index=image.dataset_index,
        subset_index=image.subset_index,
        subset=subset,
        repeats=repeats,
        size_wh=record.size_wh,
        has_alpha=record.has_alpha,
        bucket_wh=placement.bucket_wh,
        resized_wh=placement.resized_wh,
        crop_left_top=placement.crop_left_top,
        is_bucketed=is_bucketed,
    )


def _measured(found: Iterable[Found], results: Results) -> Iterator[tuple[SubsetSettings, Path, str, Size]]:
    """What info files are made of, of all images whose subset has cache_info."""
    for image in found:
        record = results[image.file]
        if image.subset.cache_info and isinstance(record, ImageRecord):
            yield image.subset, image.path, image.caption, record.size_wh


def _nothing_left(
    datasets: tuple[DatasetSettings, ...], trained: list[Item], validation: list[Item], findings: Findings
) -> Iterator[str]:
    """Datasets without a single item, where no other problem has said so."""
    if findings.problems:
        return
    used = {item.dataset_index for item in (*trained, *validation)}
    for index, dataset in enumerate(datasets):
        if index in used:
            continue
        if all(subset.is_reg for subset in dataset.subsets):
            yield f"{dataset.place} has regularisation images (is_reg) only: add the images to train"
        else:
            yield f"{dataset.place}: none of its images can be trained"
    if validation and not trained:
        yield (
            f"all of the {len(validation)} images validate and none is left to train: lower validation_split, or add images "
            "that are not marked is_validation"
        )


def _raise_problems(findings: Findings, *, skip_bad_images: bool) -> None:
    bad = list(dict.fromkeys(findings.bad))  # one file may be in several datasets
    if not findings.problems and (skip_bad_images or not bad):
        return
    problems = list(findings.problems)
    if bad and skip_bad_images:
        problems.append(f"(left out with --skip_bad_images: {len(bad):,} bad image(s) or caption(s), such as: {bad[0]})")
    elif bad:
        problems.extend(bad[:PROBLEMS_SHOWN])
        if len(bad) > PROBLEMS_SHOWN:
            problems.append(f"and {len(bad) - PROBLEMS_SHOWN:,} more")
        problems.append(f"{len(bad):,} bad image(s) or caption(s): {SKIP_HINT}")
    raise DatasetError(*map(printable, problems))
