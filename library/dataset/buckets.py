"""Aspect-ratio buckets: which size an image trains at, how it is resized to cover that size, and where it is cropped.

The numbers are those of kohya-ss/sd-scripts, so that a dataset trains on the same pixels. Sizes are (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from library.dataset.items import DatasetSettings, Item
from library.errors import DatasetError

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """Resize to ``resized_wh``, then cut ``bucket_wh`` out of it at ``crop_left_top``."""

    bucket_wh: Size
    resized_wh: Size
    crop_left_top: tuple[int, int]

    @staticmethod
    def of(item: Item) -> Placement:
        """The item's own: the crop of cached latents, and of every showing that is not cropped at random."""
        return Placement(item.bucket_wh, item.resized_wh, item.crop_left_top)


@dataclass(frozen=True)
class Buckets:
    """The buckets of one dataset; settings must be free of ``bucket_problems``."""

    settings: DatasetSettings

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Every bucket there can be, sorted; empty with bucket_no_upscale, where the images themselves make the buckets."""
        settings = self.settings
        if not settings.enable_bucket:
            return (settings.resolution_wh,)
        if settings.bucket_no_upscale:
            return ()
        steps = settings.bucket_reso_steps
        smallest, largest = rounded_limits(settings.min_bucket_reso, settings.max_bucket_reso, steps)
        return bucket_sizes(settings.resolution_wh, smallest=smallest, largest=largest, steps=steps)

    def place(self, size_wh: Size) -> Placement:
        """Raises DatasetError (without the image's name) where the image is too small for any bucket."""
        if self.settings.enable_bucket and self.settings.bucket_no_upscale:
            return self._place_without_upscaling(size_wh)
        bucket_wh = nearest_bucket(size_wh, self.sizes)
        return _centred(bucket_wh, covering_size(size_wh, bucket_wh))

    def _place_without_upscaling(self, size_wh: Size) -> Placement:
        steps = self.settings.bucket_reso_steps
        area = self.settings.resolution_wh[0] * self.settings.resolution_wh[1]
        resized = shrunk_to_area(size_wh, area=area, steps=steps) if min(size_wh) >= steps else size_wh
        bucket_wh = (resized[0] - resized[0] % steps, resized[1] - resized[1] % steps)
        if 0 in bucket_wh:
            raise DatasetError(
                f"is too small ({size_wh[0]}x{size_wh[1]}) for bucket_no_upscale: "
                f"a side would end below bucket_reso_steps ({steps} px), and nothing is enlarged"
            )
        return _centred(bucket_wh, resized)


def bucket_problems(settings: DatasetSettings, *, bucket_step: int) -> Iterator[str]:
    """What makes the settings impossible; ``bucket_step``: sides must be multiples of it for the model, in pixels."""
    if settings.enable_bucket:
        yield from _step_problems(settings, bucket_step)
    else:
        yield from _fixed_size_problems(settings, bucket_step)


def rounded_limits(smallest: int, largest: int, steps: int) -> tuple[int, int]:
    """The smallest side rounded down and the largest one rounded up to multiples of ``steps``."""
    return smallest - smallest % steps, largest + -largest % steps


def bucket_sizes(resolution_wh: Size, *, smallest: int, largest: int, steps: int) -> tuple[Size, ...]:
    """All sizes with sides in [smallest, largest], multiples of ``steps``, whose area is at most the resolution's."""
    area = resolution_wh[0] * resolution_wh[1]
    square = math.isqrt(area) // steps * steps
    sizes = {(square, square)}
    for side in range(smallest, largest + 1, steps):
        other = min(largest, area // side // steps * steps)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def nearest_bucket(size_wh: Size, sizes: tuple[Size, ...]) -> Size:
    """The size itself if it is a bucket, otherwise the nearest aspect ratio (the first one in a tie)."""
    if size_wh in sizes:
        return size_wh
    ratio = size_wh[0] / size_wh[1]
    return min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def covering_size(size_wh: Size, bucket_wh: Size) -> Size:
    """The image's size once one side fits the bucket and the other is not shorter; rounded half up."""
    if size_wh[0] / size_wh[1] > bucket_wh[0] / bucket_wh[1]:
        scale = bucket_wh[1] / size_wh[1]
    else:
        scale = bucket_wh[0] / size_wh[0]
    return int(size_wh[0] * scale + 0.5), int(size_wh[1] * scale + 0.5)


def shrunk_to_area(size_wh: Size, *, area: int, steps: int) -> Size:
    """The size kept, or scaled down to about ``area`` with one side a multiple of ``steps``.

    Of the two sides, the one is rounded whose bucket comes nearer to the image's aspect ratio (height in a tie). A side can
    come out below ``steps`` for very narrow images.
    """
    if size_wh[0] * size_wh[1] <= area:
        return size_wh
    ratio = size_wh[0] / size_wh[1]
    ideal_width = math.sqrt(area * ratio)
    width = _rounded(ideal_width, steps)
    height = _rounded(area / ideal_width, steps)
    if not width or not height:
        return (width, height)
    by_width = (width, _rounded(width / ratio, steps))
    by_height = (_rounded(height * ratio, steps), height)
    if _ratio_error(by_width, ratio) < _ratio_error(by_height, ratio):
        return width, int(width / ratio + 0.5)
    return int(height * ratio + 0.5), height


def _rounded(side: float, steps: int) -> int:
    """Half up to a whole pixel, then down to a multiple of ``steps``."""
    whole = int(side + 0.5)
    return whole - whole % steps


def _ratio_error(size_wh: Size, ratio: float) -> float:
    return abs(size_wh[0] / size_wh[1] - ratio) if size_wh[1] else math.inf


def _centred(bucket_wh: Size, resized_wh: Size) -> Placement:
    left, top = (resized_wh[0] - bucket_wh[0]) // 2, (resized_wh[1] - bucket_wh[1]) // 2
    return Placement(bucket_wh, resized_wh, (left, top))


def _step_problems(settings: DatasetSettings, bucket_step: int) -> Iterator[str]:
    steps, (width, height) = settings.bucket_reso_steps, settings.resolution_wh
    if steps % bucket_step:
        yield (
            f"{settings.place}: bucket_reso_steps is {steps}, but this model needs sides that are multiples of "
            f"{bucket_step}: give a multiple of {bucket_step}"
        )
    if settings.bucket_no_upscale:
        if min(width, height) < steps:
            yield f"{settings.place}: resolution {width}x{height} is below bucket_reso_steps {steps}: raise it or lower the steps"
        return
    smallest, largest = rounded_limits(settings.min_bucket_reso, settings.max_bucket_reso, steps)
    if smallest < steps:
        yield (
            f"{settings.place}: min_bucket_reso {settings.min_bucket_reso} is below bucket_reso_steps {steps}, "
            f"so a bucket could have no pixels: give at least {steps}"
        )
    if min(width, height) < smallest:
        yield _limit_problem(settings, "min_bucket_reso", smallest, relation="below", cure="lower")
    if max(width, height) > largest:
        yield _limit_problem(settings, "max_bucket_reso", largest, relation="above", cure="raise")


def _limit_problem(settings: DatasetSettings, key: str, rounded: int, *, relation: str, cure: str) -> str:
    given = getattr(settings, key)
    rounding = "" if given == rounded else f" ({given} rounded to steps of {settings.bucket_reso_steps})"
    width, height = settings.resolution_wh
    return (
        f"{settings.place}: resolution {width}x{height} has a side {relation} {key} {rounded}{rounding}: "
        f"{cure} {key} or change the resolution"
    )


def _fixed_size_problems(settings: DatasetSettings, bucket_step: int) -> Iterator[str]:
    for side, name in zip(settings.resolution_wh, ("width", "height"), strict=True):
        if side < bucket_step or side % bucket_step:
            near = sorted({max(bucket_step, side - side % bucket_step), side + -side % bucket_step})
            yield (
                f"{settings.place}: resolution has {name} {side}, which is not a multiple of {bucket_step}, and buckets are off: "
                f"use {' or '.join(map(str, near))}, or set enable_bucket = true"
            )
