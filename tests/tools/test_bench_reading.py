from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tools.bench_parts import reading


def test_a_small_set_gives_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STEPS", 2)
    monkeypatch.setattr(reading, "STEP_S", 0.01)
    *rates, waiting = reading.measure(1, images=12, side_px=64)
    states = ["in memory", "on disk"] if hasattr(os, "posix_fadvise") else ["in memory"]
    assert [rate.name for rate in rates] == [f"data: reading batches / whole files {state}" for state in states]
    for rate in rates:
        assert rate.at_least == 0.6
        assert rate.value > 0
        assert "24 files" in rate.how
    assert waiting.at_most == 2.0
    assert 0 <= waiting.value <= 100


def test_files_stay_as_they_are_when_they_leave_memory(tmp_path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system keeps its files in memory as it likes")
    (tmp_path / "a").write_bytes(b"data")
    reading.forget([str(tmp_path / "a")])
    assert (tmp_path / "a").read_bytes() == b"data"


def test_batches_hold_what_was_cached(tmp_path: Path) -> None:
    cached = reading.make_cached_set(tmp_path, images=8, side_px=64)
    with cached.source().batches(1, 0, workers=0) as batches:
        _, _, batch = next(batches)
    assert batch is not None
    assert batch.latents is not None
    assert (batch.latents.shape, batch.latents.dtype) == ((reading.BATCH, 16, 8, 8), torch.bfloat16)
    assert batch.text.prompt_embeds.shape == (reading.BATCH, reading.TOKENS, reading.WIDTH)  # type: ignore[union-attr]
    assert len(cached.files()) == 16
