"""Image folders: their images, the caption file of each, and the N_name layout of --train_data_dir."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
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
    return [folder / name for name in sorted(image_names(file_names(folder), extensions))]


def file_names(folder: Path) -> list[str]:
    """Everything directly inside ``folder``, in no order. Raises OSError where it cannot be listed."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def image_names(names: Iterable[str], extensions: Iterable[str]) -> Iterator[str]:
    allowed = tuple(extensions)
    return (name for name in names if name.lower().endswith(allowed) and not name.startswith("."))


def folder_problem(folder: Path, extensions: Iterable[str]) -> str:
    """Why ``folder`` gave no images: its name, what was looked for, and where images are instead."""
    extensions = tuple(extensions)
    problem = f"no images in {folder}: looked for {', '.join(extensions)}"
    with os.scandir(folder) as entries:
        children = sorted((entry.name, _is_folder(entry)) for entry in entries)
    for name, is_folder in children:
        if is_folder and _has_images(folder / name, extensions):
            return f"{problem}; sub-folders are not searched, but {name} has images: make it a subset of its own"
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  # there may be very many names
        if suffix in READ_WITH_PLUGIN:
            return f"{problem}; to read {suffix} files, pip install {plugin_package(suffix)}"
    return problem


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
    r"""The name with \xff in place of what is no text."""
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:
        data = name.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def plugin_package(extension: str) -> str:
    return {".avif": "pillow-avif-plugin (or a newer Pillow)", ".jxl": "pillow-jxl-plugin"}[extension]


def unread_images_warning(folder: Path, extensions: Iterable[str], names: Iterable[str] | None = None) -> str | None:
    """AVIF and JPEG XL files that are left out because this installation cannot read them; ``names``: the folder's files."""
    names = file_names(folder) if names is None else names
    unread = tuple(extension for extension in READ_WITH_PLUGIN if extension not in tuple(extensions))
    counts = Counter(Path(name).suffix.lower() for name in image_names(names, unread)) if unread else Counter()
    parts = [f"{count} {extension} (pip install {plugin_package(extension)})" for extension, count in sorted(counts.items())]
    return f"{folder}: images of these kinds cannot be read here and are left out: {', '.join(parts)}" if parts else None


def read_caption(image: Path, subset: SubsetSettings) -> str | None:
    """The caption file's text: its first line that is not empty, or with wildcards all of them joined by newlines.

    None where there is no file; empty where the file says nothing. Raises DatasetError naming the file when it is a folder or
    not UTF-8.
    """
    for path in caption_paths(os.fspath(image), subset.caption_extension):
        try:
            with FileIO(path) as file:  # unbuffered: a caption is read at once, and there may be 100,000
                text = file.readall().decode("utf-8-sig")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError):
            text = _caption_with_reason(Path(path))
        return caption_lines(text, all_lines=subset.enable_wildcard)
    return None


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


def caption_lines(text: str, *, all_lines: bool) -> str:
    """The lines with text, stripped: all of them, or the first."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n")]
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
        stems = {image.stem for image in images}
        names = [Path(name) for name in file_names(images[0].parent) if name.endswith(CAPTION_EXTENSIONS)]
        for other in CAPTION_EXTENSIONS:
            count = sum(name.suffix == other and name.stem in stems for name in names) if other != extension else 0
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
