"""Which images a dataset names, with their captions and masks: from folders, info files and metadata files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from library.dataset.folders import (
    EMPTY,
    MISSING,
    CaptionText,
    file_names,
    folder_problem,
    image_names,
    read_caption,
    text_problem,
    unread_images_warning,
)
from library.dataset.info_file import info_exists, read_info
from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.mask_files import MaskFolders
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
    caption_note: str = ""  # see folders.CaptionText


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
    caption_note: str = ""
    tags: str | None = None
    custom_attributes: Mapping[str, object] | None = None


class Search:
    """What every search needs: the kinds of files that are images, threads that read, and where to say what is wrong."""

    def __init__(self, extensions: tuple[str, ...], pool: ThreadPoolExecutor, findings: Findings):
        self.extensions, self.pool, self.findings = extensions, pool, findings
        self.masks = MaskFolders(extensions)


def find_all_images(datasets: Sequence[DatasetSettings], search: Search) -> list[Found]:
    """The images of all datasets, in order."""
    found = [image for index, dataset in enumerate(datasets) for image in _find_images(index, dataset, search)]
    search.findings.warnings.extend(search.masks.warnings())
    return found


def _find_images(index: int, dataset: DatasetSettings, search: Search) -> list[Found]:
    """The images of one dataset; where two subsets name the same file, the later one has it, as in the reference."""
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
                caption_note=image.caption_note,
            )
    if replaced:
        search.findings.warnings.append(f"{dataset.place}: {replaced} images are in two subsets: the later subset has them")
    return list(by_path.values())


def _find_in_subset(subset: SubsetSettings, search: Search) -> Iterator[tuple[Named, Path | None]]:
    """Images, each with its mask where the subset has masks."""
    findings = search.findings
    bad_place = _place_problem(subset)
    if bad_place:
        findings.problems.append(bad_place)
        return
    left_out: list[Path] = []
    named = [image for image in _named_images(subset, search, left_out) if _is_text(image.path, findings)]
    if subset.conditioning_data_dir is None or not named:
        yield from ((image, None) for image in named)
        return
    pairs = search.masks.pair(subset, [image.path for image in named], left_out=left_out)
    findings.problems.extend(pairs.problems)
    for image, mask in zip(named, pairs.masks, strict=False):  # no masks at all where a problem has been noted
        if isinstance(mask, str):
            findings.bad.append(mask)
        else:
            yield image, mask


def _named_images(subset: SubsetSettings, search: Search, left_out: list[Path]) -> Iterator[Named]:
    """``left_out`` gets images that are there and whose captions cannot be read."""
    if subset.metadata_file is not None:
        return _find_in_metadata(subset, search)
    if subset.cache_info and info_exists(subset):
        return _find_in_info(subset, search)
    return _find_in_folder(subset, search, left_out)


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


def _find_in_folder(subset: SubsetSettings, search: Search, left_out: list[Path]) -> Iterator[Named]:
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
    unread = unread_images_warning(folder, names, extensions)
    findings.warnings.extend([unread] if unread else [])
    read = in_chunks(lambda image: _caption_or_error(image, subset), images, search.pool, size=CAPTIONS_AT_ONCE)
    for image, caption in zip(images, read, strict=True):
        if isinstance(caption, DatasetError):
            findings.bad.append(str(caption))
            left_out.append(image)
        else:
            text, note = caption
            yield Named(image.name, image, (subset.class_tokens or "") if note == MISSING else text, note)


def _caption_or_error(image: Path, subset: SubsetSettings) -> CaptionText | DatasetError:
    try:
        return read_caption(image, subset)
    except DatasetError as error:
        return error


def _find_in_info(subset: SubsetSettings, search: Search) -> Iterator[Named]:
    findings = search.findings
    try:
        info = read_info(subset, search.extensions)
    except DatasetError as error:
        findings.problems.extend(f"{subset.place}: {problem}" for problem in error.problems)
        return
    except OSError as error:
        findings.problems.append(f"{subset.place}: {error.filename} cannot be read: {error.strerror}")
        return
    findings.problems.extend(f"{subset.place}: {problem}" for problem in info.problems)
    findings.warnings.extend(info.warnings)
    for path, (caption, note) in info.captions:
        name = path.name if path.parent == subset.image_dir else str(path)
        yield Named(name, path, caption, "" if note == EMPTY else note)  # no caption file need be empty


def _find_in_metadata(subset: SubsetSettings, search: Search) -> Iterator[Named]:
    findings = search.findings
    try:
        metadata = read_metadata(subset, search.extensions)
    except DatasetError as error:
        findings.problems.extend(f"{subset.place}: {problem}" for problem in error.problems)
        return
    findings.bad.extend(metadata.problems)
    findings.warnings.extend(metadata.warnings)
    last = {os.fspath(entry.path): entry for entry in metadata.entries}
    if len(last) < len(metadata.entries):
        findings.warnings.append(
            f"{subset.place}: {len(metadata.entries) - len(last)} entries of {subset.metadata_file} name an image that a later "
            "entry names again: the last one counts"
        )
    for entry in last.values():
        yield Named(entry.key, entry.path, entry.caption, entry.caption_note, entry.tags, entry.custom_attributes)
