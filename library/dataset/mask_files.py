"""Mask images: each image of a subset with conditioning_data_dir has one there, named like it, with any image extension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.dataset.folders import file_names, folder_problem, image_names
from library.dataset.items import SubsetSettings


@dataclass(slots=True)
class MaskFiles:
    """``masks`` has one entry for each image that was asked for: its mask, or the sentence that says what is wrong.

    ``problems`` stop the run, whatever else is found; ``warnings`` do not.
    """

    masks: list[Path | str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_masks(subset: SubsetSettings, images: Sequence[Path], extensions: tuple[str, ...]) -> MaskFiles:
    """Pairs images with the files of conditioning_data_dir by their base names (upper and lower case count)."""
    folder = subset.conditioning_data_dir
    assert folder is not None
    found = MaskFiles()
    try:
        names = sorted(image_names(file_names(folder), extensions))
        if not names:
            found.problems.append(f"{subset.place}, conditioning_data_dir: {folder_problem(folder, extensions)}")
    except OSError as error:
        found.problems.append(f"{subset.place}: conditioning_data_dir {folder} cannot be read: {error.strerror}")
        return found
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(Path(name).stem, []).append(name)
    for image in images:
        candidates = by_stem.get(image.stem, [])
        found.masks.append(folder / candidates[0] if candidates else f"{image} has no mask: no {image.stem}.* in {folder}")
        if len(candidates) > 1:
            found.problems.append(f"{image} has {len(candidates)} masks in {folder}: {', '.join(candidates)}; keep one of them")
    found.warnings.extend(_unused_warning(subset, by_stem, {image.stem for image in images}))
    return found


def _unused_warning(subset: SubsetSettings, by_stem: dict[str, list[str]], stems: set[str]) -> list[str]:
    unused = [name for stem, names in by_stem.items() if stem not in stems for name in names]
    if not unused:
        return []
    return [
        f"{subset.place}: {len(unused)} masks in {subset.conditioning_data_dir} belong to no image (such as {unused[0]}): "
        "an image and its mask must have the same name"
    ]
