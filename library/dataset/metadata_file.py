"""Metadata files: one JSON object (or one line of JSONL) per image, in place of a folder with caption files.

JSON: ``{image: {"caption": text, "tags": text}}``. JSONL: ``{"image_path": image, "caption": text, "tags": text}`` per line.
An image is named by an absolute path or by one relative to image_dir.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.dataset.folders import caption_lines
from library.dataset.items import SubsetSettings
from library.errors import DatasetError


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    key: str  # as the file names the image
    path: Path
    caption: str


def read_metadata(subset: SubsetSettings, extensions: tuple[str, ...]) -> tuple[list[MetadataEntry], list[str]]:
    """The entries in the file's order, and a problem for each that cannot be used.

    ``extensions`` are tried on names that are written without one. Raises DatasetError where the file as a whole is broken.
    """
    path = subset.metadata_file
    assert path is not None
    records = dict(_jsonl_records(path) if path.suffix.lower() == ".jsonl" else _json_records(path))
    if not records:
        raise DatasetError(f"{path} names no images")
    entries, problems = [], []
    for key, record in records.items():
        try:
            caption = joined_caption(*_caption_and_tags(record), subset)
        except ValueError as error:
            problems.append(f"{path}, {key}: {error}")
            continue
        entries.append(MetadataEntry(key, _image_path(key, subset, extensions), caption))
    return entries, problems


def joined_caption(caption: str, tags: str, subset: SubsetSettings) -> str:
    """Caption and tags as one text; with wildcards every line of the caption gets the tags."""
    lines = caption_lines(caption, all_lines=subset.enable_wildcard).split("\n")
    tags = caption_lines(tags, all_lines=False)
    if not tags:
        return "\n".join(lines)
    return "\n".join(f"{line}{subset.caption_separator}{tags}" if line else tags for line in lines)


def _json_records(path: Path) -> Iterator[tuple[str, object]]:
    try:
        document = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(document, dict):
        raise DatasetError(f'{path}: the file must hold one object, {{"image.png": {{"caption": "..."}}}}')
    yield from document.items()


def _jsonl_records(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {number}, column {error.colno}: {error.msg}") from error
        key = record.get("image_path") if isinstance(record, dict) else None
        if not isinstance(key, str):
            raise DatasetError(f'{path}, line {number}: each line needs an object with "image_path"')
        yield key, record


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def _caption_and_tags(record: object) -> tuple[str, str]:
    """Raises ValueError with what the entry must be."""
    if not isinstance(record, dict):
        raise ValueError('the entry must be an object with "caption" or "tags"')
    for name in ("caption", "tags"):
        if not isinstance(record.get(name, ""), (str, type(None))):
            raise ValueError(f'"{name}" must be a text')
    return record.get("caption") or "", record.get("tags") or ""


def _image_path(key: str, subset: SubsetSettings, extensions: tuple[str, ...]) -> Path:
    """Where the image is: relative to image_dir, else to the current folder, else to the metadata file's folder."""
    assert subset.metadata_file is not None
    bases = [subset.image_dir] if subset.image_dir else [Path(), subset.metadata_file.parent]
    candidates = [base / name for base in bases for name in (key, *(key + extension for extension in extensions))]
    return next((path for path in candidates if path.is_file()), candidates[0])
