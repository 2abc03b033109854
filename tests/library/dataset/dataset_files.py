"""Helpers of tests that read dataset files: options from flags, and files written from dictionaries."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import toml

from library.dataset.items import DatasetSettings
from library.dataset.toml_config import read_datasets
from library.errors import DatasetError
from library.options.declare import groups_of
from library.options.train import TrainOptions


def read(*, bucket_step: int = 16, **flags) -> tuple[DatasetSettings, ...]:
    """``read_datasets`` with these options and no others."""
    groups = {}
    for name, group in groups_of(TrainOptions).items():
        given = {field.name: flags.pop(field.name) for field in fields(group) if field.name in flags}
        groups[name] = group(**given)
    assert not flags
    return read_datasets(TrainOptions(**groups), bucket_step=bucket_step)


def problems(**flags) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        read(**flags)
    return list(caught.value.problems)


def write(folder: Path, document: dict | str, name: str = "my.toml") -> Path:
    path = folder / name
    text = document if isinstance(document, str) else json.dumps(document) if name.endswith(".json") else toml.dumps(document)
    path.write_text(text, encoding="utf-8")
    return path


def document(images: Path | str, *, general: dict | None = None, dataset: dict | None = None, subset: dict | None = None) -> dict:
    """One dataset with one subset at 512 px; more keys for each of the three tables."""
    return {
        "general": {"resolution": 512, **(general or {})},
        "datasets": [{**(dataset or {}), "subsets": [{"image_dir": str(images), **(subset or {})}]}],
    }
