"""Two runs with other settings in one folder at one time: neither may train on what the other has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.caches import latent_cache as latent_cache_module
from tests.library.dataset.caches.cache_parts import TinyVae, latent_cache, make_training_set, settle


def fill(cache: Any, offset: float = 0.0) -> None:
    cache.fill(lambda pixels: TinyVae()(pixels) + offset, batch_size=2, workers=1, progress=False)


def test_a_file_that_another_run_replaces_at_once_is_not_noted_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    training_set = make_training_set(tmp_path, 2)
    real = latent_cache_module.write_cache_file

    def raced(path: Path, tensors: dict[str, torch.Tensor], *, ingredients: dict[str, object], **rest: Any) -> Any:
        written = real(path, tensors, ingredients=ingredients, **rest)
        real(path, tensors, ingredients={**ingredients, "model": "v2"}, **rest)
        return written

    monkeypatch.setattr(latent_cache_module, "write_cache_file", raced)
    fill(latent_cache(training_set))
    state = latent_cache(training_set).state()
    assert [reason for _, reason in state.stale] == ["model changed"] * 2
