"""Averaging in two steps against OpenCV's in one, and what halving leaves."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
from PIL import Image

from library.dataset.resizing import averaged, halved, resize


def noise(width: int = 200, height: int = 150, *, channels: tuple[int, ...] = (3,)) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(
    ("width", "height", "size_wh"),
    [
        (160, 120, (120, 90)),
        (120, 100, (90, 84)),  # 120 -> 89.6 and the like: edges of both grids that meet
        (150, 112, (112, 84)),
        (100, 80, (100, 40)),
        (100, 80, (50, 40)),
        (100, 80, (99, 79)),
        (100, 80, (33, 27)),  # more than half
        (100, 80, (51, 27)),  # one side more, one less
        (1200, 40, (896, 30)),
    ],
)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_averaged_is_opencv_area(width: int, height: int, size_wh: tuple[int, int], channels: tuple[int, ...]):
    pixels = noise(width, height, channels=channels)
    assert (
        difference(
            averaged(pixels, size_wh, covers_wh=pixels.shape[1::-1]), cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA)
        )
        <= 1
    )


def test_averaged_at_many_sizes():
    """Where pixel edges of both grids meet, a rounded factor would take the wrong neighbour, for one size in six or so."""
    rng = random.Random(0)
    for _ in range(300):
        width, shrink = rng.randint(20, 3000), rng.uniform(1, 2)
        pixels, size_wh = noise(width, 2), (-int(-width // shrink), 2)
        assert (
            difference(
                averaged(pixels, size_wh, covers_wh=pixels.shape[1::-1]),
                cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA),
            )
            <= 1
        ), (
            width,
            size_wh,
        )


def test_averaged_keeps_one_colour_and_the_brightness():
    assert np.all(averaged(np.full((120, 160, 3), 201, np.uint8), (97, 73), covers_wh=(160, 120)) == 201)
    pixels = noise(400, 300)
    assert abs(averaged(pixels, (297, 223), covers_wh=(400, 300)).mean() - pixels.mean()) < 0.2


def test_averaged_over_a_part_of_the_last_pixels():
    """A decoder that halves 151x101 pixels gives 76x51 of which the last are half picture: exactly the mean of what is there."""
    pixels = noise(151, 101)
    edged = np.pad(pixels, ((0, 1), (0, 1), (0, 0)), "edge")
    half = np.rint(edged.reshape(51, 2, 76, 2, 3).mean(axis=(1, 3))).astype(np.uint8)
    for size_wh in ((50, 34), (30, 20)):
        found = averaged(half, size_wh, covers_wh=(75.5, 50.5))
        direct = cv2.resize(half.repeat(2, 0).repeat(2, 1)[:101, :151], size_wh, interpolation=cv2.INTER_AREA)
        assert difference(found, direct) <= 1


@pytest.mark.parametrize(
    ("size_wh", "goal_wh", "expected"),
    [
        ((400, 300), (160, 120), (200, 150)),
        ((400, 300), (100, 75), (100, 75)),
        ((400, 300), (210, 150), (400, 300)),
        ((400, 300), (30, 50), (100, 75)),  # the side that shrinks less decides
        ((401, 303), (100, 75), (101, 76)),
        ((30, 20), (60, 40), (30, 20)),
    ],
)
def test_halved(size_wh: tuple[int, int], goal_wh: tuple[int, int], expected: tuple[int, int]):
    image, covers_wh = halved(Image.new("RGB", size_wh), goal_wh, covers_wh=size_wh)
    assert image.size == expected
    assert covers_wh[0] / covers_wh[1] == size_wh[0] / size_wh[1] and 0 <= image.width - covers_wh[0] < 1


def test_halved_is_exact_where_the_factor_divides_the_size():
    image = Image.fromarray(noise(80, 64))
    means = np.asarray(image).reshape(16, 4, 20, 4, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(halved(image, (19, 15), covers_wh=(80, 64))[0]) - means).max() <= 0.5


def test_resize_to_the_same_size_changes_nothing():
    assert np.array_equal(resize(Image.fromarray(noise()), (200, 150), interpolation="lanczos"), noise())


@pytest.mark.parametrize("size_wh", [(150, 110), (260, 170), (150, 170), (260, 110)])
def test_default_is_area_where_nothing_grows_and_lanczos_elsewhere(size_wh: tuple[int, int]):
    image = Image.fromarray(noise())
    name = "area" if size_wh == (150, 110) else "lanczos"
    assert np.array_equal(resize(image, size_wh, interpolation=None), resize(image, size_wh, interpolation=name))


def test_area_that_enlarges_is_opencv_area():
    image = Image.fromarray(noise())
    assert np.array_equal(resize(image, (260, 110), interpolation="area"),
                          cv2.resize(noise(), (260, 110), interpolation=cv2.INTER_AREA))  # fmt: skip
