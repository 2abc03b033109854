"""Metadata files: one JSON object (or one line of JSONL) per image, in place of a folder with caption files.

JSON: ``{image: {"caption": text, "tags": text}}``. JSONL: ``{"image_path": image, "caption": text, "tags": text}`` per line.
An image is named by an absolute path or by one relative to image_dir. An entry may carry ``"custom_attributes"``, an object
that adds to and overrides the subset's. Anything else in an entry (``image_size``, ``train_resolution`` and what other tools
note) is left alone: sizes are read from the images themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.dataset.folders import caption_lines, is_text, printable
from library.dataset.items import SubsetSettings
from library.dataset.schema import attributes_problem
from library.errors import DatasetError
from library.files.text_file import read_utf8


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    key: str  # as the file names the image
    path: Path
    caption: str  # with the tags
    tags: str  # alone
    custom_attributes: Mapping[str, object] | None = None  # the image's own


def read_metadata(subset: SubsetSettings, extensions: tuple[str, ...]) -> tuple[list[MetadataEntry], list[str]]:
    """The entries in the file's order, and a problem for each that cannot be used; one image may have several entries.

    ``extensions`` are tried on names that are written without one. Whether the images are there is not looked at. Raises
    DatasetError where the file as a whole is broken.
    """
    path = subset.metadata_file
    assert path is not None
    records = list(_jsonl_records(path) if path.suffix.lower() == ".jsonl" else _json_records(path))
    if not records:
        raise DatasetError(f"{path} names no images")
    entries, problems = [], []
    for key, record in records:
        try:
            entries.append(_entry(key, record, subset, extensions))
        except ValueError as error:
            problems.append(f"{path}, {printable(key)}: {error}")
    return entries, problems


def _entry(key: str, record: object, subset: SubsetSettings, extensions: tuple[str, ...]) -> MetadataEntry:
    """Raises ValueError with what the entry must be."""
    if not isinstance(record, dict):
        raise ValueError('the entry must be an object with "caption" or "tags"')
    caption, tags = _caption_and_tags(record)
    attributes = record.get("custom_attributes")
    if not isinstance(attributes, (dict, type(None))):
        raise ValueError('"custom_attributes" must be an object')
    problem = attributes_problem(attributes or {})
    if problem:
        raise ValueError(f'"custom_attributes" {problem}')
    joined = joined_caption(caption, tags, subset)
    return MetadataEntry(key, _image_path(key, subset, extensions), joined, tags, attributes or None)


def joined_caption(caption: str, tags: str, subset: SubsetSettings) -> str:
    """Caption and tags (one line) as one text; with wildcards every line of the caption gets the tags."""
    lines = caption_lines(caption, all_lines=subset.enable_wildcard).split("\n")
    if not tags:
        return "\n".join(lines)
    return "\n".join(f"{line}{subset.caption_separator}{tags}" if line else tags for line in lines)


def read_json(path: Path, *, cure: str = "") -> object:
    """Raises DatasetError naming the file and the place where it is broken; ``cure`` ends the message."""
    try:
        return json.loads(read_utf8(path, error=DatasetError))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}{cure}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise DatasetError(f"{path} cannot be read: {error}{cure}") from error


def _json_records(path: Path) -> Iterable[tuple[str, object]]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise DatasetError(f'{path}: the file must hold one object, {{"image.png": {{"caption": "..."}}}}')
    return document.items()


def _jsonl_records(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(read_utf8(path, error=DatasetError).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {number}, column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}, line {number} cannot be read: {error}") from error
        key = record.get("image_path") if isinstance(record, dict) else None
        if not isinstance(key, str):
            raise DatasetError(f'{path}, line {number}: each line needs an object with "image_path"')
        yield key, record


def _caption_and_tags(record: dict[str, object]) -> tuple[str, str]:
    """The caption as written and the first line of the tags. Raises ValueError with what they must be."""
    texts = []
    for name in ("caption", "tags"):
        text = record.get(name)
        text = "" if text is None else text
        if not isinstance(text, str):
            raise ValueError(f'"{name}" must be a text')
        if not is_text(text):
            raise ValueError(f'"{name}" has half a character (\\ud800 to \\udfff without its partner): write it again')
        texts.append(text)
    return texts[0], caption_lines(texts[1], all_lines=False)


def _image_path(key: str, subset: SubsetSettings, extensions: tuple[str, ...]) -> Path:
    """Where the image is: relative to image_dir, else to the current folder, else to the metadata file's folder.

    Raises ValueError for a name that no file can have.
    """
    assert subset.metadata_file is not None
    if "\0" in key:
        raise ValueError("no file can have a name with the character \\0")
    bases = [subset.image_dir] if subset.image_dir else [Path(), subset.metadata_file.parent]
    candidates = [base / name for base in bases for name in (key, *(key + extension for extension in extensions))]
    return next((path for path in candidates if path.is_file()), candidates[0])
