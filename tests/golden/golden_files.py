"""Access to the golden numbers: recorded inputs and outputs of independent implementations."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors

DEFAULT_DIR = Path(__file__).parent / "data"


def golden_dir() -> Path:
    return Path(os.environ.get("GOLDEN_DIR") or DEFAULT_DIR)


@dataclass(frozen=True)
class Golden:
    """One file: ``weights/``, ``inputs/`` and ``outputs/`` tensors without their prefix, and the header's description."""

    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    about: dict


def load_golden(name: str) -> Golden:
    """``load_golden("anima/dit_forward.safetensors")``; skips the test where the file is not there."""
    path = golden_dir() / name
    if not path.is_file():
        pytest.skip(f"golden file {name} is not in {golden_dir()}")
    header = read_header(path)
    parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "weights_sparse": {}, "inputs": {}, "outputs": {}}
    for key, tensor in read_tensors(header):
        kind, _, rest = key.partition("/")
        if kind in parts:
            parts[kind][rest] = tensor
    about = json.loads(header.metadata["golden"])
    for key, shape in about.get("sparse_weights", {}).items():
        parts["weights"][key] = _dense(shape, parts["weights_sparse"][f"{key}/rows"], parts["weights_sparse"][f"{key}/values"])
    return Golden(parts["weights"], parts["inputs"], parts["outputs"], about)


def _dense(shape: list[int], rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """An embedding table of which only some rows are stored; the others are zero."""
    table = torch.zeros(shape, dtype=values.dtype)
    table[rows.long()] = values
    return table


def load_golden_json(name: str):
    path = golden_dir() / name
    if not path.is_file():
        pytest.skip(f"golden file {name} is not in {golden_dir()}")
    return json.loads(path.read_text(encoding="utf-8"))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|actual - expected| / max|expected|, in float64: the measure of the golden READMEs."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
