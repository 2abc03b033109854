"""Captions that a user probably believes to be trained, but are not. About images that are used: not those that are left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from library.dataset.find_images import Found
from library.dataset.folders import CAPTION_EXTENSIONS, CUT, EMPTY, MISSING, caption_path, file_names, printable
from library.dataset.items import SubsetSettings

WILDCARD = re.compile(r"\{[^{}]*\|[^{}]*\}")


def caption_warnings(images: Iterable[Found]) -> Iterator[str]:
    """``images``: all that are used."""
    subsets: dict[tuple[int, int], list[Found]] = defaultdict(list)
    for image in images:
        subsets[image.dataset_index, image.subset_index].append(image)
    for found in subsets.values():
        subset = found[0].subset
        yield from _missing_warnings(subset, found)
        yield from _empty_warnings(subset, found)
        yield from _wildcard_warnings(subset, found)


def _missing_warnings(subset: SubsetSettings, images: Sequence[Found]) -> Iterator[str]:
    missing = [image.path for image in images if image.caption_note == MISSING]
    if not missing:
        return
    extension = subset.caption_extension
    other, count = _other_extension(missing, extension) if len(missing) == len(images) else ("", 0)
    if count:
        yield (
            f"{subset.place}: none of the {len(images)} images has a {extension} caption file, and {count} {other} files "
            f'beside them are NOT read: set caption_extension = "{other}" (or --caption_extension {other})'
        )
    elif not subset.class_tokens:
        yield (
            f"{subset.place}: {len(missing)} of {len(images)} images have no {extension} caption file "
            f"(such as {missing[0].name}) and there are no class_tokens: they train with an empty caption"
        )


def _other_extension(images: Sequence[Path], extension: str) -> tuple[str, int]:
    """Under which other extension there are captions, and how many."""
    stems = {image.stem for image in images}
    names = [Path(name) for name in file_names(images[0].parent) if name.endswith(CAPTION_EXTENSIONS)]
    for other in CAPTION_EXTENSIONS:
        count = sum(name.suffix == other and name.stem in stems for name in names) if other != extension else 0
        if count:
            return other, count
    return "", 0


def _empty_warnings(subset: SubsetSettings, images: Sequence[Found]) -> Iterator[str]:
    empty = [image for image in images if image.caption_note == EMPTY]
    if not empty:
        return
    if subset.metadata_file is not None:
        yield (
            f"{subset.place}: {len(empty)} images have neither caption nor tags (such as {printable(empty[0].name)}): "
            "they train with an empty caption"
        )
    else:
        name = caption_path(empty[0].path, subset.caption_extension).name
        yield f"{subset.place}: {len(empty)} caption files are empty (such as {name}): their images train with an empty caption"


def _wildcard_warnings(subset: SubsetSettings, images: Sequence[Found]) -> Iterator[str]:
    """What only enable_wildcard makes use of."""
    if subset.enable_wildcard:
        return
    cut = [image for image in images if image.caption_note == CUT]
    braces = [image for image in images if "{" in image.caption and WILDCARD.search(image.caption)]
    parts = []
    if cut:
        parts.append(f"{len(cut)} of {len(images)} captions have more than one line (such as that of {cut[0].name}), "
                     "and only the first is used")  # fmt: skip
    if braces:
        parts.append(f"{len(braces)} of {len(images)} captions have alternatives {{a|b}} (such as that of {braces[0].name}), "
                     "which are trained as they stand, braces and all")  # fmt: skip
    if parts:
        yield f"{subset.place}: {'; '.join(parts)}: set enable_wildcard = true to have one chosen at each showing"
