"""The benchmark of decoding on small images. No times are judged."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.dataset.images import load_picture
from tools.bench_parts import decode


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_both_ways_give_the_same_picture(suffix: str, tmp_path: Path):
    item = decode.make_item(decode.Case(suffix, (640, 480), 1), tmp_path, resolution=128)
    with Image.open(item.path) as image:
        assert image.size == item.size_wh == (640, 480)
    ours, pillow = load_picture(item).pixels, decode.pillow_pixels(item, Image.Resampling.BICUBIC)
    assert ours.shape == pillow.shape == (item.bucket_wh[1], item.bucket_wh[0], 3)
    assert np.abs(ours.astype(int) - pillow.astype(int)).mean() < 6


def test_figures():
    threads = cv2.getNumThreads()
    found = decode.measure(1, cases=[decode.Case("jpg", (200, 150), 1)], resolution=64)
    assert [figure.name for figure in found] == [f"decode: jpg 200x150, Pillow {name} / ours" for name in ("BICUBIC", "BOX")]
    assert all(figure.value > 0 for figure in found) and found[0].at_least == 1.0
    assert cv2.getNumThreads() == threads
