"""Which images validate, for a state to remember and a resumed run to compare with. Pure; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from library.dataset.image_records import ImageRecords
from library.dataset.items import Item, TrainingSet

MARK_DIGITS = 12  # hexadecimal; two of a million images have the same one with a chance of 1 in 500


def validation_marks(training_set: TrainingSet) -> str:
    """A mark of the bytes of each validation image, sorted. A file that is moved or renamed keeps its own."""
    return " ".join(sorted(_marks(training_set.validation, training_set.records)))


def differences(marks_before: str, marks_now: str) -> str:
    """``"3 of 10 validation images are new, 1 is gone"``; empty where they are the same, or the state does not know them."""
    before, now = set(marks_before.split()), set(marks_now.split())
    new, gone = len(now - before), len(before - now)
    if not before or not (new or gone):
        return ""
    parts = [f"{new} of {len(now)} validation images {_are(new)} new"] if new else []
    parts += [f"{gone} {'' if new else 'validation images '}{_are(gone)} gone"] if gone else []
    return ", ".join(parts)


def trained_now(marks_before: str, training_set: TrainingSet) -> str | None:
    """A warning where images that validated before a state was saved are trained from now on, and validate no more."""
    known = set(marks_before.split()).difference(_marks(training_set.validation, training_set.records))
    marks = zip(_marks(training_set.items, training_set.records), training_set.items, strict=True) if known else ()
    moved = {mark: item for mark, item in marks if mark in known}
    if not moved:
        return None
    example, total = min(str(item.path) for item in moved.values()), len(marks_before.split())
    return (
        f"{len(moved)} of the {total} images that validated when the state was saved {_are(len(moved))} trained now (such as "
        f"{example}): validation losses of before tell nothing about them any more"
    )


def _marks(items: Sequence[Item], records: ImageRecords | None) -> list[str]:
    return [_content(item, records).hex()[:MARK_DIGITS] for item in items]


def _content(item: Item, records: ImageRecords | None) -> bytes:
    """The hash that the scan has noted; of the item's name where nothing was noted."""
    record = records.get(item.path) if records is not None else None
    return record.sha256 if record is not None else sha256(item.key.encode("utf-8", "surrogatepass")).digest()


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
