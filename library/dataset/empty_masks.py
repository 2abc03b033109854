"""Masks that let nothing count: their images would be shown and train nothing."""

from __future__ import annotations

from collections.abc import Sequence

from library.dataset.image_records import ImageRecord, ImageRecords
from library.dataset.item_warnings import by_subset
from library.dataset.items import Item

READ = "white counts, black does not, and it is the red channel that is read"


def empty_mask_findings(
    trained: Sequence[Item], validation: Sequence[Item], records: ImageRecords
) -> tuple[list[str], list[str]]:
    """(problems, warnings) about masks that are black, and alpha channels that are transparent, everywhere.

    ``records``: of all images and masks. It is a problem where nothing of what a subset trains counts.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for own in by_subset((*trained, *validation)):
        masked = [item for item in own if item.is_masked]
        empty = [item for item in masked if has_empty_mask(item, records)]
        if empty:
            to_train = [item for item in own if item.index < len(trained)]
            nothing_counts = bool(to_train) and all(has_empty_mask(item, records) for item in to_train)
            text = f"{own[0].subset.place}: {_finding(empty, len(masked), records)}"
            (problems if nothing_counts else warnings).append(text)
    return problems, warnings


def has_empty_mask(item: Item, records: ImageRecords) -> bool:
    """Whether the item's mask lets nothing of it count. ``records``: of its image and its mask."""
    if not item.is_masked:
        return False
    record = records.get(item.path if item.mask_path is None else item.mask_path)
    return record is not None and (record.is_transparent if item.mask_path is None else record.is_black)


def _finding(empty: Sequence[Item], count: int, records: ImageRecords) -> str:
    """``count``: how many images of the subset have a mask."""
    first = empty[0]
    if first.mask_path is None:
        return (
            f"{len(empty)} of {count} images with an alpha channel (such as {first.path.name}) are transparent everywhere, so "
            "that with alpha_mask nothing of them is trained: opaque places count"
        )
    text = (
        f"{len(empty)} of {count} masks (such as {first.mask_path}) are black everywhere, so that nothing of their images is "
        f"trained: {READ}"
    )
    in_alpha = [item.mask_path for item in empty if item.mask_path and _may_be_in_alpha(records.get(item.mask_path))]
    if in_alpha:
        text += f"; {in_alpha[0]} has an alpha channel: if the mask is in there, save it as a grey picture without transparency"
    return text


def _may_be_in_alpha(mask: ImageRecord | None) -> bool:
    return mask is not None and mask.has_alpha and not mask.is_transparent
