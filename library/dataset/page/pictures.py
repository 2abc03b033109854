"""Small pictures for the page: of each image that is shown, the original and what will be trained of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from library.dataset.buckets import Placement
from library.dataset.images import Picture, load_picture
from library.dataset.items import Item
from library.dataset.order import items_by_bucket
from library.dataset.page.showings import Showings
from library.dataset.picture_file import loaded_upright, opened, rgb

SIDE_PX = 220  # longest side of a small picture
JPEG_QUALITY = 82
PER_BUCKET = 40  # images shown of one bucket
IN_ALL = 600  # and on the whole page, besides those that the lists of the page start with
MASK_RGB = (220, 20, 60)  # laid over what does not count in the loss
MASK_ALPHA = 170  # of 255, where the mask is 0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallPictures:
    """Data URLs of one image, and how the first showing of it was made."""

    original: str
    trained: str  # cropped, mirrored, with its colours
    mask: str | None  # over ``trained``: red where the loss does not count
    mask_mean: float | None  # share of the picture that counts
    placement: Placement
    flipped: bool
    recoloured: bool


def choose(
    items: Sequence[Item], *, always: Iterable[Item] = (), per_bucket: int = PER_BUCKET, in_all: int = IN_ALL
) -> list[Item]:
    """Which images the page shows, in the order of the buckets; the same for every run.

    Evenly spread over each bucket, at most ``per_bucket`` of one and ``in_all`` together (of each bucket at least one while that
    lasts), and those of ``always``.
    """
    buckets = items_by_bucket(items)
    room = _shares([min(len(bucket), per_bucket) for bucket in buckets.values()], in_all)
    spread = [item for bucket, count in zip(buckets.values(), room, strict=True) for item in _spread(bucket, count)]
    chosen = {item.index for item in (*spread, *always)}
    return [item for bucket in buckets.values() for item in bucket if item.index in chosen]


def shown_words(shown: int, images: int) -> str:
    """``"89 of 300 images shown"``, and which those are."""
    words = f"{shown:,} of {images:,} images shown"
    if shown == images:
        return words
    return f"{words}: up to {PER_BUCKET} of each bucket and {IN_ALL} in all, and those that the lists of the page begin with"


def draw(items: Sequence[Item], showings: Showings, *, pool: ThreadPoolExecutor) -> Iterator[SmallPictures]:
    """The pictures in the order of ``items``; all are handed to ``pool`` at once.

    Raises DatasetError where an image or its mask cannot be read any more.
    """
    return pool.map(lambda item: _draw(item, showings), items)


def _draw(item: Item, showings: Showings) -> SmallPictures:
    showing = showings.showing(item)
    placement, colours, flipped = showing.placement, showing.colours, showing.is_flipped
    picture = load_picture(item, placement=placement, colours=colours, flipped=flipped)
    return SmallPictures(
        original=_jpeg(_whole(item)),
        trained=_jpeg(Image.fromarray(picture.pixels)),
        mask=_mask_overlay(picture),
        mask_mean=None if picture.mask is None else float(picture.mask.mean()),
        placement=placement,
        flipped=flipped,
        recoloured=colours is not None,
    )


def _whole(item: Item) -> Image.Image:
    """The upright original; a JPEG is shrunk while it is decoded, which takes a fraction of the time."""
    with opened(item.path) as image:
        image.draft(None, (2 * SIDE_PX, 2 * SIDE_PX))
        return rgb(loaded_upright(image))


def _jpeg(image: Image.Image) -> str:
    """A data URL of a JPEG whose longer side is at most SIDE_PX."""
    image = image.copy()
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return _data_url(image, "JPEG", quality=JPEG_QUALITY)


def _mask_overlay(picture: Picture) -> str | None:
    """The mask on the latent grid as a PNG that is opaque where nothing counts."""
    if picture.mask is None:
        return None
    overlay = np.empty((*picture.mask.shape, 4), np.uint8)  # (h, w, RGBA)
    overlay[..., :3] = MASK_RGB
    overlay[..., 3] = np.rint((1.0 - picture.mask) * MASK_ALPHA)
    return _data_url(Image.fromarray(overlay), "PNG")


def _data_url(image: Image.Image, kind: str, **settings: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _shares(wanted: Sequence[int], room: int) -> list[int]:
    """Hands out ``room`` places: everyone gets as many as everyone else until they have what they wanted."""
    given = [0] * len(wanted)
    open_places = sorted(range(len(wanted)), key=lambda place: (wanted[place], place))
    for done, place in enumerate(open_places):
        given[place] = min(wanted[place], room // (len(wanted) - done))
        room -= given[place]
    return given


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items at even distances, the first one among them."""
    return [items[number * len(items) // count] for number in range(count)]
