"""Metadata files: one JSON object (or one line of JSONL) per image, in place of a folder with caption files.

JSON: ``{image: {"caption": text, "tags": text}}``. JSONL: ``{"image_path": image, "caption": text, "tags": text}`` per line.
An image is named by an absolute path or by one relative to image_dir. An entry may carry ``"custom_attributes"``, an object
that adds to and overrides the subset's. Anything else in an entry (``image_size``, ``train_resolution`` and what other tools
note) is left alone: sizes are read from the images themselves. Only names that look like slips of the pen are warned about.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from library.dataset.folders import EMPTY, CaptionText, caption_text, is_text, printable
from library.dataset.items import SubsetSettings
from library.dataset.schema import PRESERVATION, attributes_problem
from library.errors import DatasetError, did_you_mean
from library.files.json_text import RepeatedNameError, parse_json
from library.files.text_file import read_utf8

FAULTS_SHOWN = 20  # broken lines of one file
TEXTS = ("caption", "tags")


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    key: str  # as the file names the image
    path: Path
    caption: str  # with the tags
    tags: str  # alone
    custom_attributes: Mapping[str, object] | None = None  # the image's own
    caption_note: str = ""  # see folders.CaptionText


@dataclass(slots=True)
class Metadata:
    """The entries in the file's order (one image may have several), and a problem for each that cannot be used."""

    entries: list[MetadataEntry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_metadata(subset: SubsetSettings, extensions: tuple[str, ...]) -> Metadata:
    """``extensions`` are tried on names that are written without one. Whether the images are there is not looked at.

    Raises DatasetError where the file as a whole is broken.
    """
    path = subset.metadata_file
    assert path is not None
    records = list(_jsonl_records(path) if path.suffix.lower() == ".jsonl" else _json_records(path))
    if not records:
        raise DatasetError(f"{path} names no images")
    metadata = Metadata()
    slips: dict[str, list[str]] = {}
    for key, record in records:
        try:
            metadata.entries.append(_entry(key, record, subset, extensions))
        except ValueError as error:
            metadata.problems.append(f"{path}, {printable(key)}: {error}")
        else:
            for slip in _slips(cast("dict[str, Any]", record)):
                slips.setdefault(slip, []).append(key)
    for slip, keys in slips.items():
        metadata.warnings.append(f"{subset.place}: {len(keys)} entries of {path} (such as {printable(keys[0])}) have {slip}")
    return metadata


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
    joined, note = joined_caption(caption, tags, subset)
    return MetadataEntry(key, _image_path(key, subset, extensions), joined, tags, attributes or None, note)


def joined_caption(caption: str, tags: str, subset: SubsetSettings) -> CaptionText:
    """Caption and tags (one line) as one text; with wildcards every line of the caption gets the tags."""
    text, note = caption_text(caption, all_lines=subset.enable_wildcard)
    if not tags:
        return CaptionText(text, note)
    lines = text.split("\n")
    joined = "\n".join(f"{line}{subset.caption_separator}{tags}" if line else tags for line in lines)
    return CaptionText(joined, "" if note == EMPTY else note)


def _slips(record: dict[str, Any]) -> Iterator[str]:
    """Names in a valid entry that are probably misspelt."""
    if not any(name in record for name in TEXTS):
        for name in record:
            if near := _near_text(name):
                yield f'neither "caption" nor "tags", but "{printable(name)}" (did you mean {near}?)'
    for name in record.get("custom_attributes") or ():
        if name != PRESERVATION and (near := _near_attribute(name)):
            yield f'the attribute "{printable(name)}", which training does not know{near}'


@lru_cache(maxsize=1024)  # the same few names in every entry
def _near_text(name: str) -> str:
    """Nearer than in other messages: entries hold many names of other tools, and "rating" is no slip of "caption"."""
    return next(iter(difflib.get_close_matches(name.lower(), TEXTS, n=1, cutoff=0.8)), "")


@lru_cache(maxsize=1024)
def _near_attribute(name: str) -> str:
    return did_you_mean(name, [PRESERVATION])


def read_json(path: Path, *, cure: str = "") -> object:
    """Raises DatasetError naming the file and the place where it is broken; ``cure`` ends the message."""
    try:
        return parse_json(read_utf8(path, error=DatasetError))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}{cure}") from error
    except RepeatedNameError as error:
        raise DatasetError(f"{path}: {printable(str(error))}{cure}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise DatasetError(f"{path} cannot be read: {error}{cure}") from error


def _json_records(path: Path) -> Iterable[tuple[str, object]]:
    try:
        document = read_json(path)
    except DatasetError as error:
        if _starts_with_json_line(path):
            raise _is_jsonl(path) from error
        raise
    if not isinstance(document, dict):
        raise DatasetError(f'{path}: the file must hold one object, {{"image.png": {{"caption": "..."}}}}')
    if isinstance(document.get("image_path"), str):
        raise _is_jsonl(path)
    return document.items()


def _starts_with_json_line(path: Path) -> bool:
    first = next((line for line in read_utf8(path, error=DatasetError).split("\n") if line.strip()), "")
    try:
        _line_record(first)
    except ValueError:
        return False
    return True


def _is_jsonl(path: Path) -> DatasetError:
    return DatasetError(f"{path} looks like JSON lines (one object per line): name it {path.stem}.jsonl")


def _jsonl_records(path: Path) -> Iterator[tuple[str, object]]:
    faults: list[str] = []
    for number, line in enumerate(read_utf8(path, error=DatasetError).split("\n"), start=1):
        if line.strip():
            try:
                yield _line_record(line)
            except ValueError as error:
                faults.append(f"{path}, line {number}{error}")
    if faults:
        more = [f"and {len(faults) - FAULTS_SHOWN:,} more lines of {path}"] if len(faults) > FAULTS_SHOWN else []
        raise DatasetError(*faults[:FAULTS_SHOWN], *more)


def _line_record(line: str) -> tuple[str, dict[str, object]]:
    """The image of a line, and its entry. Raises ValueError with the end of a sentence that begins with the line's number."""
    try:
        record = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f", column {error.colno}: {error.msg}") from error
    except RepeatedNameError as error:
        raise ValueError(f": {printable(str(error))}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f" cannot be read: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("image_path"), str):
        raise ValueError(': each line needs an object with "image_path"')
    return record["image_path"], record


def _caption_and_tags(record: dict[str, object]) -> tuple[str, str]:
    """The caption as written and the first line of the tags. Raises ValueError with what they must be."""
    texts = []
    for name in TEXTS:
        text = record.get(name)
        text = "" if text is None else text
        if not isinstance(text, str):
            raise ValueError(f'"{name}" must be a text')
        if not is_text(text):
            raise ValueError(f'"{name}" has half a character (\\ud800 to \\udfff without its partner): write it again')
        texts.append(text)
    return texts[0], caption_text(texts[1], all_lines=False).text


def _image_path(key: str, subset: SubsetSettings, extensions: tuple[str, ...]) -> Path:
    """Where the image is: relative to image_dir, else to the current folder, else to the metadata file's folder.

    Raises ValueError for a name that no file can have.
    """
    assert subset.metadata_file is not None
    if "\0" in key:
        raise ValueError("no file can have a name with the character \\0")
    bases = [subset.image_dir] if subset.image_dir else [Path(), subset.metadata_file.parent]
    spellings = _spellings(key)
    for spelling in spellings:
        for base in bases:
            for end in ("", *extensions):
                path = _without_detours(base, spelling + end)
                if path.is_file():
                    return path
    return _without_detours(bases[0], spellings[0])


def _spellings(key: str) -> list[str]:
    """The name, and where a backslash separates nothing also as Windows means it."""
    return [key, key.replace("\\", "/")] if "\\" in key and os.sep == "/" else [key]


def _without_detours(base: Path, name: str) -> Path:
    """``base / name``, spelt so that one image has one path."""
    if ".." not in name:
        return base / name
    straight = os.path.normpath(name)
    path = Path(os.path.normpath(base / straight)) if straight.startswith("..") else base / straight
    return path if path.is_file() or not (base / name).is_file() else base / name  # behind a linked folder ".." is elsewhere
