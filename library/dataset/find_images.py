"""Which images a dataset names, with their captions and masks: from folders, info files and metadata files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from library.dataset.folders import (
    caption_warnings,
    file_names,
    folder_problem,
    image_extensions,
    image_names,
    printable,
    read_caption,
    text_problem,
    unread_images_warning,
)
from library.dataset.info_file import info_exists, read_info
from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.mask_files import find_masks
from library.dataset.metadata_file import read_metadata
from library.dataset.verify import in_chunks
from library.errors import DatasetError

CAPTIONS_AT_ONCE = 256  # read by a thread before it reports back


@dataclass(slots=True, eq=False)
class Found:
    """One image of one subset, not yet read. ``name`` is what the subset calls it; ``file`` is its path as text."""

    dataset_index: int
    subset_index: int
    subset: SubsetSettings
    name: str
    path: Path
    file: str
    caption: str
    tags: str | None  # see Item
    custom_attributes: Mapping[str, object]
    mask_path: Path | None = None


@dataclass(slots=True)
class Findings:
    """What the scan has to say: ``problems`` always stop the run, ``bad`` images and captions may be skipped."""

    problems: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Named(NamedTuple):
    """An image as its subset names it. ``custom_attributes``: its own, besides the subset's."""

    name: str
    path: Path
    caption: str
    tags: str | None = None
    custom_attributes: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """What every search needs: the kinds of files that are images, threads that read, and where to say what is wrong."""

    extensions: tuple[str, ...]
    pool: ThreadPoolExecutor
    findings: Findings


def find_images(index: int, dataset: DatasetSettings, pool: ThreadPoolExecutor, findings: Findings) -> list[Found]:
    """The images of one dataset; where two subsets name the same file, the later one has it, as in the reference."""
    search = _Search(image_extensions(), pool, findings)
    by_path: dict[tuple[str, bool], Found] = {}  # what is trained cannot replace what validates: validation_split decides there
    replaced = 0
    for number, subset in enumerate(dataset.subsets):
        for image, mask in _find_in_subset(subset, search):
            own = image.custom_attributes
            attributes = {**subset.custom_attributes, **own} if own else subset.custom_attributes  # one object for all images
            file = os.fspath(image.path)
            replaced += (file, subset.is_validation) in by_path
            by_path[file, subset.is_validation] = Found(
                dataset_index=index,
                subset_index=number,
                subset=subset,
                name=image.name,
                path=image.path,
                file=file,
                caption=image.caption,
                tags=image.tags,
                custom_attributes=attributes,
                mask_path=mask,
            )
    if replaced:
        findings.warnings.append(f"{dataset.place}: {replaced} images are in two subsets: the later subset has them")
    return list(by_path.values())


def _find_in_subset(subset: SubsetSettings, search: _Search) -> Iterator[tuple[Named, Path | None]]:
    """Images, each with its mask where the subset has masks."""
    findings = search.findings
    bad_place = _place_problem(subset)
    if bad_place:
        findings.problems.append(bad_place)
        return
    named = [image for image in _named_images(subset, search) if _is_text(image.path, findings)]
    if subset.conditioning_data_dir is None or not named:
        yield from ((image, None) for image in named)
        return
    pairs = find_masks(subset, [image.path for image in named], search.extensions)
    findings.problems.extend(pairs.problems)
    findings.warnings.extend(pairs.warnings)
    for image, mask in zip(named, pairs.masks, strict=False):  # no masks at all where a problem has been noted
        if isinstance(mask, str):
            findings.bad.append(mask)
        else:
            yield image, mask


def _named_images(subset: SubsetSettings, search: _Search) -> Iterator[Named]:
    if subset.metadata_file is not None:
        return _find_in_metadata(subset, search)
    return _find_in_info(subset, search) if subset.cache_info and info_exists(subset) else _find_in_folder(subset, search)


def _place_problem(subset: SubsetSettings) -> str | None:
    for place in (subset.image_dir, subset.metadata_file, subset.conditioning_data_dir):
        problem = text_problem(str(place)) if place is not None else None
        if problem:
            return f"{subset.place}: {problem}"
    return None


def _is_text(path: Path, findings: Findings) -> bool:
    text = str(path)
    problem = None if text.isascii() else text_problem(text)
    if problem:
        findings.bad.append(problem)
    return problem is None


def _find_in_folder(subset: SubsetSettings, search: _Search) -> Iterator[Named]:
    folder, extensions, findings = subset.image_dir, search.extensions, search.findings
    assert folder is not None
    try:
        names = file_names(folder)
        images = [folder / name for name in sorted(image_names(names, extensions))]
        if not images:
            findings.problems.append(f"{subset.place}: {folder_problem(folder, extensions)}")
            return
    except OSError as error:
        findings.problems.append(f"{subset.place}: {folder} cannot be read: {error.strerror}")
        return
    unread = unread_images_warning(folder, extensions, names)
    findings.warnings.extend([unread] if unread else [])
    readable: list[Path] = []
    captions: list[str | None] = []
    read = in_chunks(lambda image: _caption_or_error(image, subset), images, search.pool, size=CAPTIONS_AT_ONCE)
    for image, caption in zip(images, read, strict=True):
        if isinstance(caption, DatasetError):
            findings.bad.append(str(caption))
            continue
        readable.append(image)
        captions.append(caption)
        yield Named(image.name, image, (subset.class_tokens or "") if caption is None else caption)
    findings.warnings.extend(caption_warnings(readable, captions, subset))


def _caption_or_error(image: Path, subset: SubsetSettings) -> str | None | DatasetError:
    try:
        return read_caption(image, subset)
    except DatasetError as error:
        return error


def _find_in_info(subset: SubsetSettings, search: _Search) -> Iterator[Named]:
    findings = search.findings
    try:
        info = read_info(subset, search.extensions)
    except DatasetError as error:
        findings.problems.append(f"{subset.place}: {error}")
        return
    except OSError as error:
        findings.problems.append(f"{subset.place}: {error.filename} cannot be read: {error.strerror}")
        return
    findings.problems.extend(f"{subset.place}: {problem}" for problem in info.problems)
    findings.warnings.extend(info.warnings)
    for path, caption in info.captions:
        yield Named(path.name if path.parent == subset.image_dir else str(path), path, caption)


def _find_in_metadata(subset: SubsetSettings, search: _Search) -> Iterator[Named]:
    findings = search.findings
    try:
        entries, problems = read_metadata(subset, search.extensions)
    except DatasetError as error:
        findings.problems.append(f"{subset.place}: {error}")
        return
    findings.bad.extend(problems)
    last = {os.fspath(entry.path): entry for entry in entries}
    if len(last) < len(entries):
        findings.warnings.append(
            f"{subset.place}: {len(entries) - len(last)} entries of {subset.metadata_file} name an image that a later entry "
            "names again: the last one counts"
        )
    without_text = [entry.key for entry in last.values() if not entry.caption]
    if without_text:
        findings.warnings.append(
            f"{subset.place}: {len(without_text)} images have neither caption nor tags (such as {printable(without_text[0])}): "
            "they train with an empty caption"
        )
    for entry in last.values():
        yield Named(entry.key, entry.path, entry.caption, entry.tags, entry.custom_attributes)
