"""Mask images: each image of a subset with conditioning_data_dir has one there, named like it, with any image extension."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from library.dataset.folders import file_names, folder_problem, image_names, unread_images_warning, unread_names
from library.dataset.items import SubsetSettings


@dataclass(slots=True)
class MaskFiles:
    """``masks`` has one entry for each image that was asked for: its mask, or the sentence that says what is wrong.

    ``problems`` stop the run, whatever else is found; where there are any, ``masks`` is empty.
    """

    masks: list[Path | str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Folder:
    """``place``: the first subset that has its masks here."""

    path: Path
    place: str
    names: list[str]  # of everything in it
    by_stem: dict[str, list[str]]
    unread: dict[str, str]  # by stem: pictures of kinds that are not read
    used: set[str] = field(default_factory=set)  # stems


class MaskFolders:
    """The mask folders of a run. Each is listed once, and several subsets may have their masks in one."""

    def __init__(self, extensions: tuple[str, ...]):
        self._extensions = extensions
        self._folders: dict[Path, _Folder] = {}

    def pair(self, subset: SubsetSettings, images: Sequence[Path], *, left_out: Iterable[Path] = ()) -> MaskFiles:
        """Pairs images with the files of conditioning_data_dir by their base names (upper and lower case count).

        ``left_out``: images of the subset that cannot be used, and whose masks are therefore not missed.
        """
        path = subset.conditioning_data_dir
        assert path is not None
        try:
            folder = self._folder(path, subset.place)
            if not folder.by_stem:
                return MaskFiles(problems=[f"{subset.place}, conditioning_data_dir: {folder_problem(path, self._extensions)}"])
        except OSError as error:
            return MaskFiles(problems=[f"{subset.place}: conditioning_data_dir {path} cannot be read: {error.strerror}"])
        folder.used.update(image.stem for image in chain(images, left_out))
        return MaskFiles([_mask_or_problem(image, path, folder) for image in images])

    def warnings(self) -> Iterator[str]:
        """About the folders as a whole, once all subsets have their masks."""
        for folder in self._folders.values():
            unread = unread_images_warning(folder.path, folder.names, self._extensions)
            if unread:
                yield f"{folder.place}, conditioning_data_dir {unread}"
            unused = [name for stem, names in folder.by_stem.items() if stem not in folder.used for name in names]
            if unused:
                yield (
                    f"{folder.place}: {len(unused)} masks in {folder.path} belong to no image (such as {unused[0]}): "
                    "an image and its mask must have the same name"
                )

    def _folder(self, path: Path, place: str) -> _Folder:
        key = path.absolute()
        if key not in self._folders:
            names = sorted(file_names(path))
            by_stem: dict[str, list[str]] = {}
            for name in image_names(names, self._extensions):
                by_stem.setdefault(Path(name).stem, []).append(name)
            unread = {Path(name).stem: name for name in unread_names(names, self._extensions)}
            self._folders[key] = _Folder(path, place, names, by_stem, unread)
        return self._folders[key]


def _mask_or_problem(image: Path, path: Path, folder: _Folder) -> Path | str:
    found = folder.by_stem.get(image.stem, [])
    if len(found) == 1:
        return path / found[0]
    if found:
        return f"{image} has {len(found)} masks in {path}: {', '.join(found)}; keep one of them"
    unread = folder.unread.get(image.stem)
    hint = f"; {unread} is there, but {Path(unread).suffix.lower()[1:]} is not read" if unread else ""
    return f"{image} has no mask: no {image.stem}.* in {path}{hint}"
