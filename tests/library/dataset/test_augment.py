"""Random crops, crops around faces, changes of colour: what is drawn, and that what is told is what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.augment import ColourChange, Face, colours_for, face_of, placement_for, told_crop
from library.dataset.buckets import Buckets, Placement
from library.dataset.images import load_picture
from library.dataset.items import DatasetSettings, Item, SubsetSettings
from library.dataset.resizing import resize
from library.dataset.scan import scan


def item(*, size_wh=(300, 200), resolution=(64, 64), buckets=False, path: Path = Path("x.png"), **settings: object) -> Item:
    subset = SubsetSettings(place="test", image_dir=None, **settings)
    dataset = DatasetSettings(place="test", resolution_wh=resolution, enable_bucket=buckets, min_bucket_reso=32, max_bucket_reso=128,
                              bucket_reso_steps=16, subsets=(subset,))  # fmt: skip
    placed = Buckets(dataset).place(size_wh)
    return Item(index=0, key="0:0:x", path=path, caption="", dataset_index=0, subset=subset, repeats=1, size_wh=size_wh,
                bucket_wh=placed.bucket_wh, resized_wh=placed.resized_wh, crop_left_top=placed.crop_left_top,
                is_bucketed=buckets)  # fmt: skip


def moments(count: int = 200) -> Iterator[dict[str, int]]:
    return ({"seed": 1, "epoch": 1 + number // 10, "occurrence": number} for number in range(count))


def placements(of: Item, count: int = 200) -> list[Placement]:
    found = [placement_for(of, **moment) for moment in moments(count)]
    for placement in found:
        assert placement.bucket_wh == of.bucket_wh
        for side in (0, 1):
            assert 0 <= placement.crop_left_top[side] <= placement.resized_wh[side] - placement.bucket_wh[side]
    return found


# ------------------------------------------------------------------ crops


@pytest.mark.parametrize("buckets", [True, False])
def test_without_augmentation_it_is_the_items_own(buckets: bool):
    plain = item(buckets=buckets)
    assert set(placements(plain)) == {Placement(plain.bucket_wh, plain.resized_wh, plain.crop_left_top)}


def test_random_crop_with_buckets_moves_inside_the_covering_image():
    cropped = item(size_wh=(310, 200), buckets=True, random_crop=True)
    found = placements(cropped)
    assert {placement.resized_wh for placement in found} == {cropped.resized_wh}
    room = [resized - goal for resized, goal in zip(cropped.resized_wh, cropped.bucket_wh, strict=True)]
    assert max(room) > 0
    assert {placement.crop_left_top for placement in found} == {(x, y) for x in range(room[0] + 1) for y in range(room[1] + 1)}


def test_random_crop_without_buckets_is_a_window_of_the_full_size_image():
    found = placements(item(size_wh=(300, 200), random_crop=True), 400)
    assert {placement.resized_wh for placement in found} == {(300, 200)}
    lefts, tops = zip(*(placement.crop_left_top for placement in found), strict=True)
    assert min(lefts) < 10 and max(lefts) > 226 and min(tops) < 6 and max(tops) > 130
    assert abs(np.mean(lefts) - 118) < 12 and abs(np.mean(tops) - 68) < 8  # uniform: means in the middle


@pytest.mark.parametrize("buckets", [False, True])
def test_random_crop_of_a_scanned_folder(buckets: bool, tmp_path: Path):
    """The scan tells whether there are buckets."""
    Image.new("RGB", (300, 200)).save(tmp_path / "x.png")
    subset = SubsetSettings(place="test", image_dir=tmp_path, random_crop=True)
    dataset = DatasetSettings(place="test", resolution_wh=(64, 64), enable_bucket=buckets, min_bucket_reso=32, max_bucket_reso=128,
                              bucket_reso_steps=16, subsets=(subset,))  # fmt: skip
    (found,) = scan((dataset,)).items
    assert {placement.resized_wh for placement in placements(found)} == {found.resized_wh if buckets else (300, 200)}


def test_random_crop_takes_every_place_alike():
    counts = Counter(placement.crop_left_top for placement in placements(item(size_wh=(66, 65), random_crop=True), 1200))
    assert len(counts) == 6 and all(140 < count < 260 for count in counts.values())


@pytest.mark.parametrize("size_wh", [(300, 60), (60, 300), (40, 30)])
def test_random_crop_without_buckets_enlarges_what_is_too_small(size_wh: tuple[int, int]):
    cropped = item(size_wh=size_wh, random_crop=True)
    assert {placement.resized_wh for placement in placements(cropped)} == {cropped.resized_wh}


def test_random_crop_of_an_image_that_just_fits():
    assert set(placements(item(size_wh=(64, 64), random_crop=True))) == {Placement((64, 64), (64, 64), (0, 0))}


def test_choices_depend_on_seed_item_and_showing_and_on_nothing_else():
    cropped = item(random_crop=True, color_aug=True)
    when = {"seed": 1, "epoch": 1, "occurrence": 0}
    others = [when | {"seed": 2}, when | {"epoch": 2}, when | {"occurrence": 1}]
    assert placement_for(cropped, **when) == placement_for(replace(cropped, index=5, caption="other"), **when)
    assert len({placement_for(cropped, **other) for other in (when, *others)}) == 4
    assert placement_for(replace(cropped, key="0:0:y"), **when) != placement_for(cropped, **when)
    # the crop is not drawn otherwise because colours are drawn as well
    assert placement_for(item(random_crop=True), **when) == placement_for(cropped, **when)


# ------------------------------------------------------------------ faces


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("anna_150_100_40_50.png", Face((150, 100), (40, 50))),
        ("a_b_c_0_0_1_1.jpg", Face((0, 0), (1, 1))),
        ("150_100_40_50.png", Face((150, 100), (40, 50))),
        ("anna.png", None),
        ("anna_150_100_40.png", None),
        ("anna_150_100_40_0x5.png", None),
        ("anna_150_100_0_0.png", None),
        ("anna_150_-100_40_50.png", None),
        ("trip_2024_12_31_18.png", None),  # a date: outside of the image
        ("anna_１５０_100_40_50.png", None),
    ],
)
def test_face_in_a_name(name: str, face: Face | None):
    assert face_of(item(path=Path(name))) == face


def scales(of: Item, count: int = 200) -> list[float]:
    found = placements(of, count)
    return [placement.resized_wh[0] / of.size_wh[0] for placement in found]


def test_face_takes_the_share_that_the_range_allows():
    faced = item(size_wh=(3000, 2000), path=Path("x_1500_1000_150_200.png"), face_crop_aug_range=(2.0, 4.0))
    shares = [64 / (200 * scale) for scale in scales(faced)]  # of the crop's side to the face's
    assert min(shares) > 1.98 and max(shares) < 4.04
    assert min(shares) < 2.1 and max(shares) > 3.6


def test_face_scale_is_limited():
    small_face = item(path=Path("x_150_100_4_4.png"), face_crop_aug_range=(2.0, 4.0))
    assert set(scales(small_face)) == {1.0}  # never enlarged
    large_face = item(path=Path("x_150_100_190_190.png"), face_crop_aug_range=(2.0, 4.0))
    assert {placement.resized_wh for placement in placements(large_face)} == {(96, 64)}  # just covers
    assert len(set(scales(item(path=Path("x_150_100_40_40.png"), face_crop_aug_range=(1.0, 1.0))))) == 1


def middles(of: Item, count: int = 200) -> np.ndarray:
    """How far the middle of each crop is from the face's, in pixels of the full-size image: (count, 2)"""
    face = face_of(of)
    assert face is not None
    rows = []
    for placement in placements(of, count):
        scale = placement.resized_wh[0] / of.size_wh[0]
        middle = [(start + goal / 2) / scale for start, goal in zip(placement.crop_left_top, placement.bucket_wh, strict=True)]
        rows.append([at - wanted for at, wanted in zip(middle, face.middle_xy, strict=True)])
    return np.array(rows)


def test_face_is_in_the_middle_with_a_little_jitter():
    faced = item(size_wh=(3000, 2000), path=Path("x_1400_900_200_160.png"), face_crop_aug_range=(2.0, 4.0))
    off = middles(faced)
    assert np.abs(off).max() < 200 / 20 + 8  # 8: half a pixel of the crop
    assert np.abs(off).max() > 200 / 40


def test_random_crop_wanders_from_the_face():
    faced = item(size_wh=(3000, 2000), path=Path("x_1400_900_200_160.png"), face_crop_aug_range=(2.0, 4.0), random_crop=True)
    off = middles(faced)
    assert np.abs(off).max() > 600
    assert np.mean(np.abs(off[:, 0]) < 500) > np.mean(np.abs(off[:, 0]) >= 800)  # but mostly near


@pytest.mark.parametrize("middle", ["0_0", "3000_2000", "3000_0", "10_1990"])
def test_crop_around_a_face_at_the_edge_stays_inside(middle: str):
    for random_crop in (False, True):
        near_edge = item(
            size_wh=(3000, 2000), path=Path(f"x_{middle}_200_160.png"), face_crop_aug_range=(1.5, 4.0), random_crop=random_crop
        )
        assert len(set(placements(near_edge))) > 1  # each of them inside: placements() looks


def test_face_in_an_image_that_is_too_small():
    faced = item(size_wh=(50, 40), path=Path("x_40_10_20_20.png"), face_crop_aug_range=(1.5, 4.0))
    found = placements(faced)
    assert {placement.resized_wh for placement in found} == {faced.resized_wh}
    assert np.mean([placement.crop_left_top[0] for placement in found]) > 12  # to the right, where the face is


def test_images_without_face_data_are_cropped_plainly():
    plain = item(path=Path("anna.png"), face_crop_aug_range=(2.0, 4.0))
    assert set(placements(plain)) == {Placement.of(plain)}
    anywhere = item(path=Path("anna.png"), face_crop_aug_range=(2.0, 4.0), random_crop=True)
    assert placements(anywhere) == placements(item(random_crop=True))


def test_face_of_a_turned_photo_is_where_the_upright_picture_has_it(tmp_path: Path):
    path = tmp_path / "x_150_500_60_60.jpg"
    upright = Image.new("RGB", (400, 600), (0, 0, 255))
    upright.paste((255, 0, 0), (120, 470, 180, 530))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    faced = item(size_wh=(400, 600), path=path, face_crop_aug_range=(2.0, 2.0))
    pixels = load_picture(faced, placement=placement_for(faced, seed=0, epoch=1, occurrence=0)).pixels
    assert pixels.shape == (64, 64, 3)
    assert pixels[20:44, 20:44, 0].min() > 200 and pixels[:8].max(axis=(0, 1))[0] < 60 and pixels[:, :8].max(axis=(0, 1))[0] < 60


# ------------------------------------------------------------------ the crop that is told is the crop that was made


CROPS = {
    "centred": {},
    "centred in a bucket": {"buckets": True},
    "random": {"random_crop": True},
    "random in a bucket": {"random_crop": True, "buckets": True},
    "face": {"face_crop_aug_range": (1.0, 3.0)},
    "random around a face": {"face_crop_aug_range": (1.0, 3.0), "random_crop": True},
}


@pytest.mark.parametrize("kind", CROPS)
@pytest.mark.parametrize("size_wh", [(301, 203), (203, 301), (60, 50)])
def test_told_crop(kind: str, size_wh: tuple[int, int], tmp_path: Path):
    path = tmp_path / "x_30_40_31_29.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size_wh[::-1], 3), dtype=np.uint8))
    image.save(path)
    shown = item(size_wh=size_wh, path=path, **CROPS[kind])
    for occurrence in range(4):
        placement = placement_for(shown, seed=3, epoch=1, occurrence=occurrence)
        whole = resize(image, placement.resized_wh, interpolation=None)  # (H, W, 3), mirrored below as the showing is
        for flipped in (False, True):
            left, top = told_crop(placement, flipped=flipped)
            cut = (whole[:, ::-1] if flipped else whole)[top : top + placement.bucket_wh[1], left : left + placement.bucket_wh[0]]
            assert np.array_equal(load_picture(shown, placement=placement, flipped=flipped).pixels, cut)


def test_told_crop_of_the_example():
    """1000x700 in the bucket 576x448: 32 px go on either side, and none above."""
    placement = Placement((576, 448), (640, 448), (32, 0))
    assert told_crop(placement, flipped=False) == told_crop(placement, flipped=True) == (32, 0)
    assert told_crop(Placement((576, 448), (640, 448), (10, 0)), flipped=True) == (54, 0)


# ------------------------------------------------------------------ colours


def test_a_third_of_the_showings_change_their_colours():
    found = [colours_for(item(color_aug=True), **moment) for moment in moments(3000)]
    changes = [change for change in found if change is not None]
    assert abs(len(changes) / 3000 - 0.33) < 0.03
    gammas = [change.gamma for change in changes if change.gamma != 1.0]
    hues = [change.hue_steps for change in changes if change.gamma == 1.0]
    assert abs(len(gammas) / len(changes) - 0.5) < 0.06
    assert all(change.hue_steps == 0 for change in changes if change.gamma != 1.0)
    assert set(hues) == set(range(-8, 9))
    assert 0.95 <= min(gammas) < 0.953 and 1.047 < max(gammas) <= 1.05


def test_without_color_aug_colours_stay():
    assert {colours_for(item(), **moment) for moment in moments()} == {None}


def test_hue_turns_by_two_degrees_a_step():
    pixels = np.full((4, 5, 3), (200, 40, 40), np.uint8)
    turned = ColourChange(hue_steps=8).applied_to(pixels)
    assert np.abs(turned[0, 0].astype(int) - (200, 40 + 160 * 16 / 60, 40)).max() <= 2
    assert np.abs(ColourChange(hue_steps=-8).applied_to(pixels)[0, 0].astype(int) - (200, 40, 40 + 160 * 16 / 60)).max() <= 2
    assert np.array_equal(pixels, np.full((4, 5, 3), (200, 40, 40), np.uint8))  # the given array is left alone


def test_hue_leaves_grey_alone():
    grey = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    assert np.array_equal(ColourChange(hue_steps=8).applied_to(grey), grey)


def test_gamma():
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    for gamma in (0.95, 1.05):
        changed = ColourChange(gamma=gamma).applied_to(levels)
        assert np.abs(changed[0, :, 0] - 255 * (np.arange(256) / 255) ** gamma).max() <= 0.5
        assert changed[0, 0, 0] == 0 and changed[0, 255, 0] == 255
    assert ColourChange(gamma=1.05).applied_to(levels)[0, 128, 0] < 128


def test_colour_change_is_a_plain_value():
    assert ColourChange(hue_steps=3) == ColourChange(3, 1.0) and hash(ColourChange()) == hash(ColourChange())
    with pytest.raises(FrozenInstanceError):
        ColourChange().gamma = 2.0  # type: ignore[misc]
    pixels = np.zeros((2, 2, 3), np.uint8)
    assert ColourChange().applied_to(pixels) is pixels


def test_colours_of_a_cropped_view():
    """Crops are views with gaps between their rows, which OpenCV must take as they are."""
    whole = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    view = whole[3:30, 5:40]
    for change in (ColourChange(hue_steps=4), ColourChange(gamma=0.96)):
        assert np.array_equal(change.applied_to(view), change.applied_to(np.ascontiguousarray(view)))
