"""The settings of the datasets as a state holds them, so that a resumed run can tell what is not as it was. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from library.dataset.items import DatasetSettings, SubsetSettings

# what does not change the training, and the split, which a state names as a whole
LEFT_OUT = {
    DatasetSettings: {"place", "warnings", "validation_split", "validation_seed", "resize_interpolation"},
    SubsetSettings: {"place", "cache_info", "tags_joined"},
}


def dataset_history(datasets: Sequence[DatasetSettings]) -> dict[str, str]:
    """Names such as "[[datasets]] 1, subset 2: flip_aug" -> values as text, resolved: wherever they stand. Paths by name only."""
    history = {"the number of datasets": str(len(datasets))}
    for number, dataset in enumerate(datasets, start=1):
        place = f"[[datasets]] {number}"
        history.update(_settings(place, dataset))
        for subset_number, subset in enumerate(dataset.subsets, start=1):
            history.update(_settings(f"{place}, subset {subset_number}", subset))
    return history


def _settings(place: str, settings: DatasetSettings | SubsetSettings) -> Iterator[tuple[str, str]]:
    for field in fields(settings):
        if field.name not in LEFT_OUT[type(settings)]:
            name = field.name.removesuffix("_wh")
            yield f"{place}: {name}", _text(getattr(settings, field.name))


def _text(value: object) -> str:
    """As it would be written, as far as a person must tell it from another."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, tuple):
        are_subsets = any(isinstance(part, SubsetSettings) for part in value)
        return str(len(value)) if are_subsets else "x".join(map(str, value))
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)
