from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from library.dataset.items import SubsetSettings
from library.dataset.page.pictures import SIDE_PX, choose, draw
from library.errors import DatasetError
from tests.library.dataset.page.page_parts import make_item, save_picture, showings_of, training_set


def decoded(url: str) -> Image.Image:
    start, _, data = url.partition(",")
    assert start in ("data:image/jpeg;base64", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def drawn(item):
    data = training_set([item])
    with ThreadPoolExecutor(1) as pool:
        (pictures,) = draw(data.items, showings_of(data), pool=pool)
    return pictures


def many(tmp_path, count, bucket_wh=(64, 64)):
    return [make_item(tmp_path, f"{bucket_wh[0]}-{number}.png", bucket_wh=bucket_wh) for number in range(count)]


def test_all_are_shown_where_there_is_room(tmp_path):
    items = training_set(many(tmp_path, 5)).items
    assert choose(items) == list(items)


def test_a_bucket_shows_images_from_all_over_it(tmp_path):
    items = training_set(many(tmp_path, 100)).items
    assert [item.index for item in choose(items, per_bucket=4)] == [0, 25, 50, 75]


def test_a_small_bucket_is_whole_before_a_large_one_is(tmp_path):
    items = training_set([*many(tmp_path, 3, (32, 64)), *many(tmp_path, 30), *many(tmp_path, 50, (96, 32))]).items
    chosen = choose(items, in_all=13)
    counts = [sum(item.bucket_wh[0] == width for item in chosen) for width in (32, 64, 96)]
    assert counts == [3, 5, 5]


def test_named_images_are_shown_besides(tmp_path):
    items = training_set(many(tmp_path, 100)).items
    assert [item.index for item in choose(items, always=[items[99], items[25]], per_bucket=2)] == [0, 25, 50, 99]


def test_more_buckets_than_room(tmp_path):
    items = training_set([item for width in (32, 64, 96) for item in many(tmp_path, 2, (width, 32))]).items
    assert len(choose(items, in_all=2)) == 2


def test_pictures_show_the_original_and_the_crop(tmp_path):
    item = save_picture(make_item(tmp_path, size_wh=(600, 900), resized_wh=(64, 96)))
    pictures = drawn(item)
    original, trained = decoded(pictures.original), decoded(pictures.trained)
    assert max(original.size) <= SIDE_PX
    assert original.size[0] / original.size[1] == pytest.approx(2 / 3, abs=0.01)
    assert trained.size == (64, 64)
    assert np.asarray(trained)[32, 10, 0] > 150 > np.asarray(trained)[32, 50, 0]  # red is left
    assert pictures.placement.crop_left_top == (0, 16)
    assert (pictures.mask, pictures.flipped, pictures.recoloured) == (None, False, False)


def test_a_mirrored_showing_is_mirrored_with_its_mask(tmp_path):
    subset = SubsetSettings(place="here", image_dir=tmp_path, flip_aug=True)
    items = [save_picture(make_item(tmp_path, f"{n}.png", subset=subset, mask_path=tmp_path / "mask.png")) for n in range(8)]
    mask = Image.new("L", (64, 96))
    mask.paste(255, (0, 0, 32, 96))  # the left half counts
    mask.save(tmp_path / "mask.png")
    sides = set()
    for pictures in map(drawn, items):
        red = np.asarray(decoded(pictures.trained))[32, :, 0]
        cover = np.asarray(decoded(pictures.mask))[..., 3]  # (h, w), opaque where nothing counts
        assert cover.shape == (8, 8)
        left, right = (0, -1) if not pictures.flipped else (-1, 0)
        assert red[left] > 100 > red[right]
        assert (cover[:, left] == 0).all()
        assert (cover[:, right] > 100).all()
        assert pictures.mask_mean == pytest.approx(0.5)
        sides.add(pictures.flipped)
    assert sides == {False, True}


def test_an_image_that_changed_since_the_scan_is_an_error(tmp_path):
    item = save_picture(make_item(tmp_path))
    with pytest.raises(DatasetError, match=r"a\.png"):
        drawn(replace(item, size_wh=(65, 96)))
