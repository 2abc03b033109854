"""``metadata_cache.json`` of a subset with cache_info: which images its folder has, and their captions.

``{image path: {"caption": text, "resolution": [width, height]}}``, as kohya-ss/sd-scripts writes it. Where the file exists it
stands in for the list of the folder and for all caption files; where it is missing it is written once the images are checked.
It goes stale like any copy, so that is looked for: listed images that are gone stop the run; images that it lacks, and caption
files that are newer than it or gone, are warned about. Its sizes are not used: each image is verified, and remembered, by us.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from library.dataset.folders import CaptionText, caption_paths, caption_text, file_names, image_names, is_text, printable
from library.dataset.items import SubsetSettings
from library.dataset.metadata_file import read_json
from library.errors import DatasetError, OutputError
from library.files.atomic import write_text_atomically

INFO_NAME = "metadata_cache.json"

Size = tuple[int, int]


@dataclass(slots=True)
class FolderInfo:
    """What the file says: (image, caption) sorted by image, and what is wrong with it."""

    captions: list[tuple[Path, CaptionText]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def info_path(subset: SubsetSettings) -> Path:
    assert subset.image_dir is not None
    return subset.image_dir / INFO_NAME


def info_exists(subset: SubsetSettings) -> bool:
    return _mtime_ns(info_path(subset)) is not None


def read_info(subset: SubsetSettings, extensions: tuple[str, ...]) -> FolderInfo:
    """Raises DatasetError naming the file where it is broken, and OSError where the folder cannot be listed."""
    path = info_path(subset)
    cure = "; delete the file, it will be made again"
    document = read_json(path, cure=cure)
    if not isinstance(document, dict) or not document:
        raise DatasetError(f"{path} must hold an object with an entry for each image{cure}")
    names = set(file_names(path.parent))
    found: dict[Path, CaptionText] = {}
    gone: list[str] = []
    for key, entry in document.items():
        caption = entry.get("caption") if isinstance(entry, dict) else None
        if not isinstance(caption, str) or not is_text(caption):
            raise DatasetError(f'{path}: the entry of {printable(key)} must be an object with a text "caption"{cure}')
        image = _image_path(key, path.parent, names)
        if image is None:
            gone.append(key)
        else:
            found[image] = caption_text(caption, all_lines=subset.enable_wildcard)
    info = FolderInfo(sorted(found.items()))
    if gone:
        info.problems.append(f"{path} lists {len(gone)} images that are gone (such as {printable(gone[0])}){cure}")
    info.warnings.extend(_lacking_warning(subset, names, found, extensions))
    info.warnings.extend(_stale_warning(subset, names, found))
    return info


def write_missing_infos(images: Iterable[tuple[SubsetSettings, Path, str, Size]]) -> Iterator[str]:
    """Writes the file of each subset that has none, atomically. ``images``: subset, image, caption, size of the upright picture.

    Yields a warning for each that could not be written.
    """
    documents: dict[Path, dict[str, object]] = {}
    unclear: set[Path] = set()
    for subset, image, caption, size_wh in images:
        document = documents.setdefault(info_path(subset), {})
        entry = {"caption": caption, "resolution": list(size_wh)}
        if document.setdefault(str(image), entry) != entry:
            unclear.add(info_path(subset))  # two datasets read this folder's captions in different ways
    for path, document in documents.items():
        if _mtime_ns(path) is not None:
            continue
        if path in unclear:
            yield f"{path} is not written (cache_info): two subsets with this folder have different captions for its images"
            continue
        try:
            write_text_atomically(path, json.dumps(document, ensure_ascii=False, indent=2))
        except OutputError as error:
            yield f"cache_info: {error}"


def _image_path(key: str, folder: Path, names: set[str]) -> Path | None:
    """The file of that name in the folder, wherever the folder was when the file was written; else the path as it stands."""
    for name in (os.path.basename(key), key.replace("\\", "/").rpartition("/")[2]):  # noqa: PTH119  # very many names
        if name in names:
            return folder / name
    return Path(key) if "\0" not in key and Path(key).is_file() else None


def _lacking_warning(
    subset: SubsetSettings, names: set[str], images: Iterable[Path], extensions: tuple[str, ...]
) -> Iterator[str]:
    lacking = sorted(set(image_names(names, extensions)) - {image.name for image in images})
    if lacking:
        yield (
            f"{subset.place}: {len(lacking)} images of the folder (such as {lacking[0]}) are not in {info_path(subset)} and are "
            "left out: delete that file to have it made again, or switch cache_info off"
        )


def _stale_warning(subset: SubsetSettings, names: set[str], captions: Mapping[Path, CaptionText]) -> Iterator[str]:
    """Caption files that changed or went since the file was written. Where not a single image has one they were never there,
    or the file is meant to replace them."""
    path = info_path(subset)
    files = {image: _caption_file(image, subset, names) for image in captions}
    written_ns = _mtime_ns(path) or 0
    edited = [name for name in files.values() if name and (_mtime_ns(path.parent / name) or 0) > written_ns]
    without_file = caption_text(subset.class_tokens or "", all_lines=subset.enable_wildcard).text
    gone = [image.name for image, name in files.items() if not name and captions[image].text != without_file]
    parts = []
    if edited:
        parts.append(f"{len(edited)} caption files (such as {edited[0]}) are newer than {path}")
    if gone and any(files.values()):
        parts.append(f"the caption files of {len(gone)} images (such as {gone[0]}) are gone since {path} was written")
    if parts:
        yield (
            f"{subset.place}: {', and '.join(parts)}, whose captions are used: "
            "delete that file to have it made again, or switch cache_info off"
        )


def _caption_file(image: Path, subset: SubsetSettings, names: set[str]) -> str:
    """The name of the image's caption file; empty where it has none. Elsewhere than in the subset's folder none is looked for."""
    return next((name for name in caption_paths(image.name, subset.caption_extension) if name in names), "")


def _mtime_ns(path: Path) -> int | None:
    """None where there is nothing, or nothing that may be looked at."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
