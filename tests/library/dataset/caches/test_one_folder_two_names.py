"""Two datasets that name one folder in two ways."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.dataset.items import TrainingSet
from tests.library.dataset.caches.cache_parts import TinyTextEncoder, TinyVae, latent_cache, make_training_set, text_cache

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
COUNT = 3


@pytest.fixture
def both(tmp_path: Path) -> TrainingSet:
    """Each image twice, once through a link, there with another crop and other captions."""
    first = make_training_set(tmp_path / "images", COUNT, shuffle_caption=True)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    second = [
        replace(
            item,
            index=COUNT + item.index,
            key=f"1:{item.key}",
            path=tmp_path / "link" / item.path.name,
            caption=f"other, {item.caption}",
            resized_wh=(item.bucket_wh[0] + 16, item.bucket_wh[1]),
            crop_left_top=(16, 0),
        )
        for item in first.items
    ]
    return replace(first, items=(*first.items, *second))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_each_gets_its_own_latents(tmp_path: Path, both: TrainingSet, elsewhere: bool) -> None:
    cache_dir = tmp_path / "cache" if elsewhere else None
    expected = latent_cache(both, on_disk=False)
    found = latent_cache(both, cache_dir=cache_dir)
    for cache in (expected, found):
        cache.fill(TinyVae(), batch_size=1, workers=2, progress=False)
    assert latent_cache(both, cache_dir=cache_dir).state().valid == 2 * COUNT
    for item in both.items:
        assert torch.equal(found.load(item), expected.load(item))
    assert not torch.equal(found.load(both.items[0]), found.load(both.items[COUNT]))


def test_where_nothing_differs_they_share(both: TrainingSet) -> None:
    twice = replace(both, items=tuple(replace(item, resized_wh=item.bucket_wh, crop_left_top=(0, 0)) for item in both.items))
    cache = latent_cache(twice)
    assert cache.state().total == COUNT
    cache.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    assert torch.equal(cache.load(twice.items[0]), cache.load(twice.items[COUNT]))


def test_all_texts_are_there_after_one_fill(both: TrainingSet) -> None:
    text_cache(both, variants=16).fill(TinyTextEncoder(), batch_size=4, progress=False)
    cache = text_cache(both, variants=16)
    assert cache.state().is_complete
    for item in both.items:
        for variant in range(16):
            cache.load(item, variant)
