"""Masks lie in the cache with the latents of their image."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.image_records import ImageRecords
from library.dataset.images import load_picture
from library.dataset.items import TrainingSet
from library.dataset.verify import read_record
from library.files.safetensors_file import read_header
from tests.library.dataset.caches.cache_parts import (
    TinyVae,
    changed,
    latent_cache,
    make_training_set,
    mask_of,
    watch_hashing,
    with_masks,
)

A_FILE = "a.png.64x64.tiny-latents.safetensors"


def fill(training_set: TrainingSet, **settings: object) -> TinyVae:
    vae = TinyVae()
    latent_cache(training_set, **settings).fill(vae, batch_size=2, workers=1, progress=False)
    return vae


def reasons(training_set: TrainingSet) -> list[str]:
    return [reason for _, reason in latent_cache(training_set).state().stale]


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_mask_is_that_of_the_picture_and_mirrored_with_it(tmp_path: Path, on_disk: bool) -> None:
    training_set = with_masks(make_training_set(tmp_path, 3, flip_aug=True))
    cache = latent_cache(training_set, on_disk=on_disk)
    said = cache.state().bytes_needed
    cache.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    for item in training_set.items:
        for flipped in (False, True):
            mask, expected = mask_of(cache, item, flipped=flipped), load_picture(item, flipped=flipped).mask
            assert mask is not None
            assert expected is not None
            assert mask.dtype == torch.float32
            assert np.array_equal(mask.numpy(), expected)
    assert not torch.equal(mask_of(cache, training_set.items[0]), mask_of(cache, training_set.items[0], flipped=True))
    if not on_disk:
        assert said == sum(tensor.nbytes for tensors in cache._memory.values() for tensor in tensors.values())


def test_an_image_without_a_mask_has_none(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    fill(training_set)
    assert mask_of(latent_cache(training_set), training_set.items[0]) is None
    assert set(read_header(tmp_path / A_FILE).tensors) == {"latents"}


def test_the_alpha_channel_as_mask(tmp_path: Path) -> None:
    training_set = changed(make_training_set(tmp_path, 1, alpha_mask=True), 0, has_alpha=True)
    pixels = np.random.default_rng(5).integers(0, 256, (64, 64, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    fill(training_set)
    item = training_set.items[0]
    assert np.array_equal(mask_of(latent_cache(training_set), item), load_picture(item).mask)
    assert reasons(training_set) == []
    assert reasons(with_masks(training_set)) == ["mask changed"]  # from a file now


def test_a_new_a_changed_and_a_dropped_mask(tmp_path: Path) -> None:
    plain = make_training_set(tmp_path, 2)
    fill(plain)
    masked = with_masks(plain)
    assert reasons(masked) == ["has no mask"] * 2
    latents = latent_cache(plain).load(plain.items[0])
    fill(masked)
    assert reasons(masked) == []
    assert reasons(plain) == []  # one that is not wanted does no harm
    assert torch.equal(latent_cache(masked).load(masked.items[0]), latents)
    mask_path = masked.items[0].mask_path
    assert mask_path is not None
    Image.new("L", (64, 64), 77).save(mask_path)
    assert reasons(masked) == ["mask changed"]
    fill(masked)
    mask = mask_of(latent_cache(masked), masked.items[0])
    assert mask is not None
    assert mask.unique().tolist() == pytest.approx([77 / 255])


def test_an_unchanged_mask_is_not_hashed_again_and_a_touched_one_stays_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_set = replace(with_masks(make_training_set(tmp_path, 2)), records=ImageRecords(writes=False))
    mask_path = training_set.items[0].mask_path
    assert training_set.records is not None
    assert mask_path is not None
    for item in training_set.items:
        for path in (item.path, item.mask_path):
            training_set.records.put(path, read_record(path))  # as at a start
    fill(training_set)
    (tmp_path / "atelier.tiny-latents.json").unlink(missing_ok=True)
    hashed = watch_hashing(monkeypatch)
    assert reasons(training_set) == []
    assert hashed == []
    os.utime(mask_path, ns=(7, 7))
    assert reasons(training_set) == []
    assert hashed == [mask_path]


def test_two_datasets_with_other_masks_have_files_of_their_own(tmp_path: Path) -> None:
    first = with_masks(make_training_set(tmp_path, 1), "one")
    item = first.items[0]
    assert item.mask_path is not None
    other_mask = tmp_path / "two" / "a.png"
    other_mask.parent.mkdir()
    Image.new("L", (64, 64), 255).save(other_mask)
    unmasked, same = replace(item, index=1, mask_path=None), replace(item, index=2)
    other = replace(item, index=3, mask_path=other_mask)
    training_set = replace(first, items=(item, unmasked, same), validation=(other,))
    cache = latent_cache(training_set)
    cache.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    assert cache.state().total == 2
    assert torch.equal(mask_of(cache, item), mask_of(cache, same))
    assert mask_of(cache, other).unique().tolist() == [1]
    assert torch.equal(cache.load(unmasked), cache.load(other))
    assert latent_cache(training_set).state().is_complete
    reordered = replace(training_set, items=(replace(unmasked, index=0), replace(item, index=1), replace(same, index=2)))
    assert latent_cache(reordered).state().is_complete  # the one without a mask shares the file of the first that has one


def test_a_moved_dataset_keeps_its_masks(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    fill(with_masks(make_training_set(here, 2)))
    shutil.move(here, there)
    assert latent_cache(with_masks(make_training_set(there, 2))).state().is_complete


def test_a_damaged_mask_is_found_at_the_start(tmp_path: Path) -> None:
    training_set = with_masks(make_training_set(tmp_path, 1))
    fill(training_set)
    whole = (tmp_path / A_FILE).read_bytes()
    place = read_header(tmp_path / A_FILE).tensors["mask"].start
    (tmp_path / A_FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert reasons(training_set) == ["damaged: the bytes of its tensors are not those that were written"]
    fill(training_set)
    assert (tmp_path / A_FILE).read_bytes() == whole


def test_a_mask_of_another_size_stops_with_both_names(tmp_path: Path) -> None:
    training_set = with_masks(make_training_set(tmp_path, 1))
    mask_path = training_set.items[0].mask_path
    assert mask_path is not None
    Image.new("L", (32, 32)).save(mask_path)
    with pytest.raises(Exception, match=r"mask.*a\.png.*a\.png"):
        fill(training_set)


def test_validation_images_share_the_cache(tmp_path: Path) -> None:
    whole = make_training_set(tmp_path, 4)
    split = replace(whole, items=whole.items[:3], validation=whole.items[3:])
    assert len(fill(split).batches) == 2
    cache = latent_cache(split)
    assert cache.state().total == 4
    assert cache.load(split.validation[0]).shape == (4, 8, 12)
    assert latent_cache(whole).state().is_complete
    assert latent_cache(changed(whole, 0)).state().is_complete
