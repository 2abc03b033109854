"""Buckets beyond the golden numbers: limits, refusals, and properties of every placement."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from library.dataset.buckets import Buckets, Placement, bucket_problems
from library.dataset.items import DatasetSettings, Item, SubsetSettings
from library.errors import DatasetError


def settings(resolution_wh=(512, 512), **changes) -> DatasetSettings:
    return DatasetSettings(
        **{"place": "my.toml, [[datasets]] 1", "resolution_wh": resolution_wh, "enable_bucket": True, "subsets": ()} | changes
    )


def problems(*arguments, **changes) -> str:
    return "\n".join(bucket_problems(settings(*arguments, **changes), bucket_step=16))


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize("resolution", [(512, 512), (1024, 1024), (768, 512)])
@pytest.mark.parametrize("steps", [16, 64])
def test_every_placement_covers_its_bucket(no_upscale: bool, resolution: tuple[int, int], steps: int):
    buckets = Buckets(settings(resolution, bucket_no_upscale=no_upscale, bucket_reso_steps=steps))
    assert not list(bucket_problems(buckets.settings, bucket_step=16))
    rng = random.Random(0)
    for _ in range(300):
        size = (rng.randint(128, 5000), rng.randint(128, 5000))
        placed = buckets.place(size)
        for side in (0, 1):
            assert placed.bucket_wh[side] % steps == 0
            assert 0 <= placed.crop_left_top[side] <= placed.resized_wh[side] - placed.bucket_wh[side]
            assert not no_upscale or placed.resized_wh[side] <= size[side]


def test_several_resolutions_of_one_image():
    """Three datasets with the same folder: one item each, in buckets of about the resolution's area."""
    for resolution in (512, 768, 1024):
        placed = Buckets(settings((resolution, resolution), bucket_reso_steps=16, max_bucket_reso=2048)).place((3000, 2000))
        width, height = placed.bucket_wh
        assert 0.9 * resolution**2 < width * height <= resolution**2
        assert abs(width / height - 1.5) < 0.05 and min(placed.resized_wh[0] - width, placed.resized_wh[1] - height) == 0


def test_finer_steps_crop_less():
    lost = []
    for steps in (64, 16):
        placed = Buckets(settings((512, 512), bucket_reso_steps=steps)).place((1000, 700))
        lost.append(1 - placed.bucket_wh[0] * placed.bucket_wh[1] / (placed.resized_wh[0] * placed.resized_wh[1]))
    assert lost[1] < lost[0] / 2


def test_own_placement_of_an_item():
    subset = SubsetSettings(place="test", image_dir=None)
    item = Item(index=0, key="x", path=Path("x.png"), caption="", dataset_index=0, subset=subset, repeats=1, size_wh=(100, 80),
                bucket_wh=(64, 64), resized_wh=(80, 64), crop_left_top=(8, 0))  # fmt: skip
    assert Placement.of(item) == Placement((64, 64), (80, 64), (8, 0))


def test_without_buckets_everything_trains_at_the_resolution():
    placed = Buckets(settings((512, 768), enable_bucket=False)).place((1000, 1000))
    assert (placed.bucket_wh, placed.resized_wh, placed.crop_left_top) == ((512, 768), (768, 768), (128, 0))


def test_possible_settings_have_no_problem():
    assert problems() == ""
    assert problems((1024, 1024)) == ""
    assert problems((2048, 2048), bucket_no_upscale=True) == ""  # max_bucket_reso does not matter then
    assert problems((528, 512), enable_bucket=False) == ""


def test_resolution_outside_of_the_limits():
    assert "has a side below min_bucket_reso 576 (600 rounded to steps of 64)" in problems(min_bucket_reso=600)
    assert "has a side above max_bucket_reso 1024: raise max_bucket_reso" in problems((2048, 512))


def test_steps_that_the_model_cannot_take():
    assert problems(bucket_reso_steps=24).startswith("my.toml, [[datasets]] 1: bucket_reso_steps is 24, but this model needs")


def test_buckets_without_pixels_are_refused():
    assert "min_bucket_reso 32 is below bucket_reso_steps 64" in problems(min_bucket_reso=32)
    assert "below bucket_reso_steps 64" in problems((32, 32), bucket_no_upscale=True)


def test_fixed_resolution_must_fit_the_model():
    text = problems((1000, 512), enable_bucket=False)
    assert "width 1000, which is not a multiple of 16" in text and "use 992 or 1008" in text


@pytest.mark.parametrize("size", [(1, 1), (63, 2000), (20000, 40), (8000, 60), (100000, 64)])
def test_image_that_no_bucket_takes(size: tuple[int, int]):
    with pytest.raises(DatasetError, match=f"is too small \\({size[0]}x{size[1]}\\)"):
        Buckets(settings(bucket_no_upscale=True)).place(size)
