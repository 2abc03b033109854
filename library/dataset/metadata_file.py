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
from library.files.text_file import read_utf8


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    key: str  # as the file names the image
    path: Path
    caption: str  # with the tags
    tags: str  # alone


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
            caption, tags = _caption_and_tags(record)
        except ValueError as error:
            problems.append(f"{path}, {key}: {error}")
            continue
        joined = joined_caption(caption, tags, subset)
        entries.append(MetadataEntry(key, _image_path(key, subset, extensions), joined, tags))
    return entries, problems


def joined_caption(caption: str, tags: str, subset: SubsetSettings) -> str:
    """Caption and tags (one line) as one text; with wildcards every line of the caption gets the tags."""
    lines = caption_lines(caption, all_lines=subset.enable_wildcard).split("\n")
    if not tags:
        return "\n".join(lines)
    return "\n".join(f"{line}{subset.caption_separator}{tags}" if line else tags for line in lines)


def _json_records(path: Path) -> Iterator[tuple[str, object]]:
    try:
        document = json.loads(read_utf8(path, error=DatasetError))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(document, dict):
        raise DatasetError(f'{path}: the file must hold one object, {{"image.png": {{"caption": "..."}}}}')
    yield from document.items()


def _jsonl_records(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(read_utf8(path, error=DatasetError).split("\n"), start=1):
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


def _caption_and_tags(record: object) -> tuple[str, str]:
    """The caption as written and the first line of the tags. Raises ValueError with what the entry must be."""
    if not isinstance(record, dict):
        raise ValueError('the entry must be an object with "caption" or "tags"')
    for name in ("caption", "tags"):
        if not isinstance(record.get(name, ""), (str, type(None))):
            raise ValueError(f'"{name}" must be a text')
    return record.get("caption") or "", caption_lines(record.get("tags") or "", all_lines=False)


def _image_path(key: str, subset: SubsetSettings, extensions: tuple[str, ...]) -> Path:
    """Where the image is: relative to image_dir, else to the current folder, else to the metadata file's folder."""
    assert subset.metadata_file is not None
    bases = [subset.image_dir] if subset.image_dir else [Path(), subset.metadata_file.parent]
    candidates = [base / name for base in bases for name in (key, *(key + extension for extension in extensions))]
    return next((path for path in candidates if path.is_file()), candidates[0])
