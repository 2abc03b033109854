"""Image folders: their images, the caption file of each, and the N_name layout of --train_data_dir."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from library.dataset.items import SubsetSettings
from library.errors import DatasetError
from library.files.text_file import read_utf8

ALWAYS_READ = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
READ_WITH_PLUGIN = {".avif": "pillow_avif", ".jxl": "pillow_jxl"}  # newer Pillow reads AVIF by itself
CAPTION_EXTENSIONS = (".txt", ".caption", ".cap")  # what tagging tools write


@dataclass(frozen=True, slots=True)
class NamedFolder:
    """A sub-folder ``N_name`` of --train_data_dir: its images are shown N times an epoch."""

    path: Path
    repeats: int
    class_tokens: str


def image_extensions() -> tuple[str, ...]:
    """Lower-case extensions that this installation reads, each with its dot."""
    from PIL import Image

    for plugin in READ_WITH_PLUGIN.values():
        try:
            __import__(plugin)  # registers itself with Pillow
        except ImportError:
            continue
    registered = Image.registered_extensions()
    return (*ALWAYS_READ, *(extension for extension in READ_WITH_PLUGIN if extension in registered))


def list_images(folder: Path, extensions: Iterable[str]) -> list[Path]:
    """The images directly inside ``folder``, sorted by path; hidden files (``._x.png`` of macOS) are none."""
    allowed = tuple(extensions)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.name.lower().endswith(allowed)]
    return [folder / name for name in sorted(names)]


def folder_problem(folder: Path, extensions: Iterable[str]) -> str:
    """Why ``folder`` gave no images: its name, what was looked for, and where images are instead."""
    extensions = tuple(extensions)
    problem = f"no images in {folder}: looked for {', '.join(extensions)}"
    for child in sorted(folder.iterdir()):
        if child.is_dir() and list_images(child, extensions):
            return f"{problem}; sub-folders are not searched, but {child.name} has images: make it a subset of its own"
        if child.suffix.lower() in READ_WITH_PLUGIN:
            return f"{problem}; to read {child.suffix.lower()} files, pip install {plugin_package(child.suffix.lower())}"
    return problem


def plugin_package(extension: str) -> str:
    return {".avif": "pillow-avif-plugin (or a newer Pillow)", ".jxl": "pillow-jxl-plugin"}[extension]


def unread_images_warning(folder: Path, extensions: Iterable[str]) -> str | None:
    """AVIF and JPEG XL files that are left out because this installation cannot read them."""
    unread = tuple(extension for extension in READ_WITH_PLUGIN if extension not in tuple(extensions))
    counts = Counter(path.suffix.lower() for path in list_images(folder, unread)) if unread else Counter()
    parts = [f"{count} {extension} (pip install {plugin_package(extension)})" for extension, count in sorted(counts.items())]
    return f"{folder}: images of these kinds cannot be read here and are left out: {', '.join(parts)}" if parts else None


def read_caption(image: Path, subset: SubsetSettings) -> str | None:
    """The caption file's text: its first line that is not empty, or with wildcards all of them joined by newlines.

    None where there is no file; empty where the file says nothing. Raises DatasetError naming the file when it is not UTF-8.
    """
    path = caption_path(image, subset.caption_extension)
    try:
        text = read_utf8(path, error=DatasetError)
    except DatasetError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return caption_lines(text, all_lines=subset.enable_wildcard)


def caption_path(image: Path, extension: str) -> Path:
    return image.with_name(image.stem + extension)


def caption_lines(text: str, *, all_lines: bool) -> str:
    """The lines with text, stripped: all of them, or the first."""
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line]
    return "\n".join(lines if all_lines else lines[:1])


def caption_warnings(images: list[Path], captions: list[str | None], subset: SubsetSettings) -> Iterator[str]:
    """Captions that a user probably believes to be read, but are not. ``captions`` as ``read_caption`` gave them."""
    missing = [image for image, caption in zip(images, captions, strict=True) if caption is None]
    empty = [image for image, caption in zip(images, captions, strict=True) if caption == ""]
    if missing:
        yield from _missing_caption_warnings(images, missing, subset)
    if empty:
        name = caption_path(empty[0], subset.caption_extension).name
        yield f"{subset.place}: {len(empty)} caption files are empty (such as {name}): their images train with an empty caption"


def named_folders(parent: Path) -> tuple[list[NamedFolder], list[str]]:
    """The sub-folders ``N_name`` of ``parent``, sorted, and the names of those that are not of this form."""
    found, ignored = [], []
    for child in sorted(parent.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        number, _, name = child.name.partition("_")
        if number.isdecimal() and int(number) > 0:
            found.append(NamedFolder(child, int(number), name))
        else:
            ignored.append(child.name)
    return found, ignored


def layout_problem(flag: str, parent: Path, ignored: list[str]) -> str:
    """Why ``--train_data_dir`` gave no subset, with the layout that is needed."""
    if list_images(parent, image_extensions()):
        found = "has images directly inside"
    elif ignored:
        found = f"has no such folder, only {', '.join(ignored[:5])}"
    else:
        found = "has no sub-folders"
    return (
        f"{flag} {parent} {found}: images must be in sub-folders named N_name, N being the repeats per epoch, "
        f"such as {parent / '10_cat'}; or name the folder in a file for --dataset_config"
    )


def _missing_caption_warnings(images: list[Path], missing: list[Path], subset: SubsetSettings) -> Iterator[str]:
    extension = subset.caption_extension
    if len(missing) == len(images):
        for other in CAPTION_EXTENSIONS:
            count = sum(caption_path(image, other).is_file() for image in images) if other != extension else 0
            if count:
                yield (
                    f"{subset.place}: none of the {len(images)} images has a {extension} caption file, and {count} {other} files "
                    f'beside them are NOT read: set caption_extension = "{other}" (or --caption_extension {other})'
                )
                return
    if not subset.class_tokens:
        yield (
            f"{subset.place}: {len(missing)} of {len(images)} images have no {extension} caption file "
            f"(such as {missing[0].name}) and there are no class_tokens: they train with an empty caption"
        )
