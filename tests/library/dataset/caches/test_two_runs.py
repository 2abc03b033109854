"""Two runs with other settings in one folder at one time: neither may train on what the other has made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.caches import latent_cache as latent_cache_module
from library.errors import DatasetError
from tests.library.dataset.caches.cache_parts import (
    TEXT_RECIPE,
    TinyTextEncoder,
    TinyVae,
    changed,
    latent_cache,
    make_training_set,
    settle,
    text_cache,
)


def fill(cache: Any, offset: float = 0.0) -> None:
    cache.fill(lambda pixels, seeds: TinyVae()(pixels) + offset, batch_size=2, workers=1, progress=False)


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


@pytest.mark.parametrize("change", [{"vae_fingerprint": "v2"}, {"dtype": "float32"}, {"arch": "tiny"}])
def test_latents_that_another_run_replaced_while_training(tmp_path: Path, change: dict[str, str]) -> None:
    training_set = make_training_set(tmp_path, 2, flip_aug=True)
    mine, other = latent_cache(training_set), latent_cache(training_set, **change)
    fill(mine)
    before = mine.load(training_set.items[0])
    fill(other, offset=1.0)
    started_later = latent_cache(training_set)
    if change == {"arch": "tiny"}:  # nothing differs
        assert torch.equal(started_later.load(training_set.items[0]), before)
        return
    with pytest.raises(DatasetError, match="replaced by another run with other settings .* --cache_dir of its own"):
        started_later.load(training_set.items[0])
    assert (
        latent_cache(training_set, skip_check=True).load(training_set.items[0]).dtype == other.load(training_set.items[0]).dtype
    )
    assert len(list(tmp_path.glob("*latents.safetensors"))) == 2  # it is no damage


def test_latents_of_another_size_under_the_same_name(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    fill(latent_cache(training_set))
    other = latent_cache(changed(training_set, 0, crop_left_top=(8, 0), resized_wh=(72, 64)))
    fill(other)
    with pytest.raises(DatasetError, match="replaced by another run"):
        latent_cache(training_set).load(training_set.items[0])


def test_text_that_another_run_replaced_while_training(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    mine, other = text_cache(training_set), text_cache(training_set, recipe=replace(TEXT_RECIPE, encoder_fingerprint="e2"))
    for cache in (mine, other):
        cache.fill(TinyTextEncoder(), batch_size=2, progress=False)
    for load in (lambda cache: cache.load(training_set.items[0]), lambda cache: cache.load_text("")):
        load(other)
        load(text_cache(training_set, skip_check=True))
        with pytest.raises(DatasetError, match="replaced by another run with other settings"):
            load(mine)


def test_another_runs_variants_stay(tmp_path: Path) -> None:
    mine = make_training_set(tmp_path, 1, shuffle_caption=True)
    theirs = make_training_set(tmp_path, 1, shuffle_caption=True, caption_prefix="more, ")
    fewer, more = text_cache(mine, variants=32), text_cache(theirs, variants=32)
    for cache in (fewer, more):
        cache.fill(TinyTextEncoder(), batch_size=8, progress=False)
    for variant in range(32):
        fewer.load(mine.items[0], variant)
        more.load(theirs.items[0], variant)
    assert fewer.state().is_complete and more.state().is_complete


def test_what_a_file_lacks_that_was_not_checked(tmp_path: Path) -> None:
    fill(latent_cache(make_training_set(tmp_path, 1)))
    flipped = make_training_set(tmp_path, 1, flip_aug=True)
    with pytest.raises(DatasetError, match="lacks latents_flipped: start again, once without --skip_cache_check"):
        latent_cache(flipped, skip_check=True).load(flipped.items[0], flipped=True)
