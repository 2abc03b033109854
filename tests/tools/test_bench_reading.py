from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.bench_parts import reading


def test_a_small_set_gives_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STEPS", 2)
    monkeypatch.setattr(reading, "STEP_S", 0.01)
    rate, waiting = reading.measure(1, images=12, side_px=64)
    assert (rate.at_least, waiting.at_most) == (0.6, 2.0)
    assert rate.value > 0
    assert 0 <= waiting.value <= 100
    assert "24 files" in rate.how


def test_batches_hold_what_was_cached(tmp_path: Path) -> None:
    cached = reading.make_cached_set(tmp_path, images=8, side_px=64)
    batch = cached.source().micro_batch(1, 0)
    assert batch is not None
    assert batch.latents is not None
    assert (batch.latents.shape, batch.latents.dtype) == ((reading.BATCH, 16, 8, 8), torch.bfloat16)
    assert batch.text.prompt_embeds.shape == (reading.BATCH, reading.TOKENS, reading.WIDTH)  # type: ignore[union-attr]
    assert len(cached.files()) == 16
