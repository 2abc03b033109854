"""What differs from one showing of an image to the next: where it is cropped, and its colours.

Every choice is a pure function of (seed, item, epoch, occurrence); nothing here keeps state. ``epoch`` is 1-based.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.dataset.buckets import Placement, Size
from library.dataset.items import Item
from library.randomness import python_random

if TYPE_CHECKING:
    import numpy as np

# The chances and ranges of kohya-ss/sd-scripts.
COLOUR_CHANCE = 0.33
HUE_STEPS = 8  # at most, either way
HUES = 180  # OpenCV's count of hues for 8-bit pixels: 2 degrees each
GAMMA_RANGE = (0.95, 1.05)
FACE_JITTER = 1 / 20  # of the face's side: how far from its middle a crop may be centred


@dataclass(frozen=True, slots=True)
class ColourChange:
    """A turn of the hue by ``hue_steps`` of 180, then brightness raised to ``gamma`` (above 1: darker)."""

    hue_steps: int = 0
    gamma: float = 1.0

    def applied_to(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> a new array of the same kind, or ``pixels`` itself where nothing changes."""
        if self.hue_steps:
            pixels = _hue_turned(pixels, self.hue_steps)
        return pixels if self.gamma == 1.0 else _gamma_applied(pixels, self.gamma)


@dataclass(frozen=True, slots=True)
class Face:
    """A face as the file name has it: its middle and its sides, in pixels of the upright full-size image."""

    middle_xy: tuple[int, int]
    size_wh: Size


def placement_for(item: Item, *, seed: int, epoch: int, occurrence: int) -> Placement:
    """How one showing is resized and cropped: the item's own placement, unless its subset asks for random or face crops."""
    subset = item.subset
    if not subset.random_crop and subset.face_crop_aug_range is None:
        return Placement.of(item)
    rng = python_random("crop", seed, item.key, epoch, occurrence)
    face = face_of(item) if subset.face_crop_aug_range is not None else None
    if face is not None:
        return _face_crop(item, face, rng)
    return _random_crop(item, rng) if subset.random_crop else Placement.of(item)


def colours_for(item: Item, *, seed: int, epoch: int, occurrence: int) -> ColourChange | None:
    """How the colours of one showing change: with color_aug a third of the showings get another hue or another gamma."""
    if not item.subset.color_aug:
        return None
    rng = python_random("colours", seed, item.key, epoch, occurrence)
    if rng.random() >= COLOUR_CHANCE:
        return None
    if rng.random() < 0.5:
        return ColourChange(hue_steps=rng.randint(-HUE_STEPS, HUE_STEPS))
    return ColourChange(gamma=rng.uniform(*GAMMA_RANGE))


def told_crop(placement: Placement, *, flipped: bool) -> tuple[int, int]:
    """(left, top): where the crop was made, in pixels of the resized image, mirrored where the showing is.

    This is what SDXL is told. kohya-ss/sd-scripts tells the offsets of another way to fit, of a crop that it does not make.
    """
    left, top = placement.crop_left_top
    return (placement.resized_wh[0] - placement.bucket_wh[0] - left if flipped else left), top


def face_of(item: Item) -> Face | None:
    """The face that a file name ending in ``_cx_cy_w_h`` tells of. None where it does not, or tells of one outside the image
    (numbers in a name are often a date)."""
    parts = item.path.stem.split("_")[-4:]
    if len(parts) < 4 or not all(part.isascii() and part.isdecimal() for part in parts):
        return None
    x, y, width, height = map(int, parts)
    inside = x <= item.size_wh[0] and y <= item.size_wh[1]
    return Face((x, y), (width, height)) if inside and max(width, height) > 0 else None


def _random_crop(item: Item, rng: random.Random) -> Placement:
    placement = Placement.of(item)
    fits = item.size_wh[0] >= item.bucket_wh[0] and item.size_wh[1] >= item.bucket_wh[1]
    if fits and not item.is_bucketed:  # as in kohya-ss/sd-scripts: the window moves over the full-size image
        placement = replace(placement, resized_wh=item.size_wh)
    (width, height), (across, down) = placement.resized_wh, placement.bucket_wh
    return replace(placement, crop_left_top=(rng.randint(0, width - across), rng.randint(0, height - down)))


def _face_crop(item: Item, face: Face, rng: random.Random) -> Placement:
    """Scaled so that the face takes the share of the crop that the range allows, and cropped around it."""
    scale = _face_scale(item, face, rng)
    jitter = max(face.size_wh) * scale * FACE_JITTER
    resized, starts = [], []
    for side, middle, goal in zip(item.size_wh, face.middle_xy, item.bucket_wh, strict=True):
        length = max(int(side * scale + 0.5), goal)  # rounding must not leave a pixel short
        at = middle * scale
        if item.subset.random_crop:  # anywhere in the image, but mostly near the face
            shift = rng.triangular(-1, 1) * max(at, length - at)
        else:
            shift = rng.uniform(-jitter, jitter)
        resized.append(length)
        starts.append(_crop_start(at + shift, goal, length))
    return Placement(item.bucket_wh, (resized[0], resized[1]), (starts[0], starts[1]))


def _face_scale(item: Item, face: Face, rng: random.Random) -> float:
    assert item.subset.face_crop_aug_range is not None
    covering = max(goal / side for side, goal in zip(item.size_wh, item.bucket_wh, strict=True))
    if covering >= 1:
        return covering
    least, most = item.subset.face_crop_aug_range  # of the crop's side to the face's
    whole = min(item.bucket_wh) / max(face.size_wh)
    smallest, largest = (min(max(whole / share, covering), 1.0) for share in (most, least))
    return rng.uniform(smallest, largest)


def _crop_start(middle: float, goal: int, length: int) -> int:
    """Where ``goal`` pixels around ``middle`` begin, kept inside of ``length``."""
    return min(max(int(middle - goal / 2 + 0.5), 0), length - goal)


def _hue_turned(pixels: np.ndarray, steps: int) -> np.ndarray:
    import cv2
    import numpy as np

    turned = ((np.arange(256) + steps) % HUES).astype(np.uint8)
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = turned[hsv[..., 0]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _gamma_applied(pixels: np.ndarray, gamma: float) -> np.ndarray:
    import cv2
    import numpy as np

    levels = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return cv2.LUT(pixels, levels)
