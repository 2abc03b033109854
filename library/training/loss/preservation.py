"""Differential output preservation: images whose target is what the model makes of them without the network.

For images of a whole class, so that training one member of it leaves the others as they were. Asked for by the custom
attribute ``diff_output_preservation`` of a subset or an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.dataset.schema import PRESERVATION

if TYPE_CHECKING:
    from library.dataset.batch import Batch


def is_preserved(custom_attributes: Mapping[str, object]) -> bool:
    return bool(custom_attributes.get(PRESERVATION))


def preserved_rows(batch: Batch) -> list[int]:
    """The places of such images in the batch."""
    return [row for row, attributes in enumerate(batch.custom_attributes) if is_preserved(attributes)]
