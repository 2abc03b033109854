"""Image folders: their images, the caption file of each, and the N_name layout of --train_data_dir."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from library.dataset.items import SubsetSettings
from library.errors import DatasetError
from library.files.text_file import read_utf8

ALWAYS_READ = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PLUGINS = ("pillow_avif", "pillow_jxl")
READ_WITH_PLUGIN = {".avif": "pillow-avif-plugin, or a newer Pillow", ".jxl": "pillow-jxl-plugin"}  # what to install
CAPTION_EXTENSIONS = (".txt", ".caption", ".cap")  # what tagging tools write
TO_RENAME, TO_CONVERT = (".jfif", ".jpe", ".pjpeg"), (".gif", ".tif", ".tiff", ".heic", ".heif", ".apng", ".jp2", ".tga", ".ppm")
NOT_READ = {**dict.fromkeys(TO_RENAME, "rename to .jpg"), **dict.fromkeys(TO_CONVERT, "convert to .png or .webp")}  # what to do
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # would break a line, or do something to the terminal

MISSING, EMPTY, CUT = "missing", "empty", "cut"  # what there is to note about a caption


@dataclass(frozen=True, slots=True)
class NamedFolder:
    """A sub-folder ``N_name`` of --train_data_dir: its images are shown N times an epoch."""

    path: Path
    repeats: int
    class_tokens: str


def image_extensions() -> tuple[str, ...]:
    """Lower-case extensions that this installation reads, each with its dot."""
    from PIL import Image

    for plugin in PLUGINS:
        try:
            __import__(plugin)  # registers itself with Pillow
        except ImportError:
            continue
    registered = Image.registered_extensions()
    return (*ALWAYS_READ, *(extension for extension in READ_WITH_PLUGIN if extension in registered))


def list_images(folder: Path, extensions: Iterable[str]) -> list[Path]:
    """The images directly inside ``folder``, sorted by path; hidden files (``._x.png`` of macOS) are none."""
    return [folder / name for name in sorted(image_names(file_names(folder), extensions))]


def file_names(folder: Path) -> list[str]:
    """Everything directly inside ``folder``, in no order. Raises OSError where it cannot be listed."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def image_names(names: Iterable[str], extensions: Iterable[str]) -> Iterator[str]:
    allowed = tuple(extensions)
    return (name for name in names if name.lower().endswith(allowed) and not name.startswith("."))


class CaptionText(NamedTuple):
    """``note``: ``MISSING`` without a file, ``EMPTY`` where it says nothing, ``CUT`` where it has lines that are not used."""

    text: str
    note: str = ""


def folder_problem(folder: Path, extensions: Iterable[str]) -> str:
    """Why ``folder`` gave no images: its name, what was looked for, and where images are instead."""
    extensions = tuple(extensions)
    problem = f"no images in {folder}: looked for {', '.join(extensions)}"
    with os.scandir(folder) as entries:
        children = sorted((entry.name, _is_folder(entry)) for entry in entries)
    for name, is_folder in children:
        if is_folder and _has_images(folder / name, extensions):
            return f"{problem}; sub-folders are not searched, but {name} has images: make it a subset of its own"
    unread = unread_images(unread_names((name for name, _ in children), extensions))
    return f"{problem}; not read: {unread}" if unread else problem


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _has_images(folder: Path, extensions: tuple[str, ...]) -> bool:
    try:
        return any(image_names(file_names(folder), extensions))
    except OSError:  # not readable for this user
        return False


def text_problem(path: str) -> str | None:
    """Linux allows any bytes in a file name; such a name fits into no caption, cache or metadata file."""
    return None if is_text(path) else f"the name {printable(path)} is not valid UTF-8: rename it"


def is_text(value: str) -> bool:
    """File names can hold bytes, and JSON can write halves of characters, that no encoder takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    r"""The name with \xff in place of what is no text, and \n in place of what would break the line."""
    if name.isprintable():
        return name
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:
        data = name.encode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], data.decode("utf-8", "backslashreplace"))


def unread_names(names: Iterable[str], extensions: Iterable[str]) -> list[str]:
    """The pictures among ``names`` whose kind is known but not read; those of ``extensions`` are."""
    read = set(extensions)
    return list(image_names(names, (kind for kind in (*NOT_READ, *READ_WITH_PLUGIN) if kind not in read)))


def unread_images(names: Iterable[str]) -> str:
    """What to do about such pictures: "1 .gif, 2 .tif (convert them ...), 1 .jxl (pip install ...)"."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name in names:
        kind = os.path.splitext(name)[1].lower()  # noqa: PTH122  # there may be very many names
        cure = NOT_READ.get(kind) or f"pip install {READ_WITH_PLUGIN[kind]}"
        counts[cure][kind] += 1
    parts = [(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())), cure) for cure, kinds in counts.items()]
    return ", ".join(f"{kinds} ({cure})" for kinds, cure in sorted(parts))


def unread_images_warning(folder: Path, names: Iterable[str], extensions: Iterable[str]) -> str | None:
    """``names``: the files of the folder."""
    unread = unread_names(names, extensions)
    return f"{folder}: pictures of these kinds are not read and are left out: {unread_images(unread)}" if unread else None


def read_caption(image: Path, subset: SubsetSettings) -> CaptionText:
    """The caption file's text: its first line that is not empty, or with wildcards all of them joined by newlines.

    Raises DatasetError naming the file when it is a folder or not UTF-8.
    """
    for path in caption_paths(os.fspath(image), subset.caption_extension):
        try:
            with FileIO(path) as file:  # unbuffered: a caption is read at once, and there may be 100,000
                text = file.readall().decode("utf-8-sig")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError):
            text = _caption_with_reason(Path(path))
        return caption_text(text, all_lines=subset.enable_wildcard)
    return CaptionText("", MISSING)


def _caption_with_reason(path: Path) -> str:
    if path.is_dir():
        raise DatasetError(f"{path} is a folder, but a caption file of that name would be read: rename or remove it")
    return read_utf8(path, error=DatasetError)


def caption_paths(image: str, extension: str) -> Iterator[str]:
    """Where the caption of an image may be, the first that exists counts: named like the image, or for a face crop
    ``name_x_y_w_h.png`` (four numbers) like the picture that it was cut from."""
    stem = os.path.splitext(image)[0]  # noqa: PTH122
    yield stem + extension
    name, *numbers = stem.rsplit("_", 4)
    if len(numbers) == 4 and all(number.isdecimal() for number in numbers):
        yield name + extension


def caption_path(image: Path, extension: str) -> Path:
    return image.with_name(image.stem + extension)


def caption_text(text: str, *, all_lines: bool) -> CaptionText:
    """The lines with text, stripped: all of them, or the first."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if len(lines) > 1 and not all_lines:
        return CaptionText(lines[0], CUT)
    return CaptionText("\n".join(lines), "" if lines else EMPTY)


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
