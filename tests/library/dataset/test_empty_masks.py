"""Masks that let nothing count are found before they train nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.image_records import ImageRecords
from library.dataset.items import DatasetSettings, SubsetSettings, TrainingSet
from library.dataset.scan import scan
from library.dataset.verify import read_record
from library.errors import DatasetError

SIZE = (64, 48)
BLACK, WHITE = 0, 255


def save(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def one_pixel(mode: str, colour, background) -> Image.Image:
    image = Image.new(mode, SIZE, background)
    image.putpixel((3, 2), colour)
    return image


def start(folder: Path, *, split: float = 0.0, **settings) -> TrainingSet:
    values = {"place": "my.toml, subset 1", "image_dir": folder / "images", "class_tokens": "cat"}
    subset = SubsetSettings(**values | settings)
    dataset = DatasetSettings(place="my.toml", resolution_wh=(64, 64), subsets=(subset,), validation_split=split)
    return scan((dataset,), records=ImageRecords())


def problem(folder: Path, **settings) -> str:
    with pytest.raises(DatasetError) as caught:
        start(folder, **settings)
    (text,) = caught.value.problems
    return text


BLACK_ONES = {
    "grey.png": Image.new("L", SIZE),
    "colours.jpg": Image.new("RGB", SIZE),
    "only green.png": Image.new("RGB", SIZE, (0, 255, 9)),
    "bits.png": Image.new("1", SIZE),
    "palette.png": Image.new("RGB", SIZE, (0, 1, 2)).quantize(2),
    "opaque.png": Image.new("RGBA", SIZE, (0, 0, 0, 255)),
    "deep.png": Image.fromarray(np.zeros(SIZE[::-1], np.uint16)),
    "lossy.webp": Image.new("RGB", SIZE),
}
OTHERS = {
    "grey.png": one_pixel("L", 1, 0),
    "colours.jpg": one_pixel("RGB", (255, 255, 255), (0, 0, 0)),
    "red.png": one_pixel("RGB", (255, 0, 0), (0, 0, 0)),
    "bits.png": one_pixel("1", 1, 0),
    "palette.png": one_pixel("RGB", (200, 0, 0), (0, 0, 0)).quantize(2),
    "deep.png": Image.fromarray(np.full(SIZE[::-1], 60_000, np.uint16)),
}


@pytest.mark.parametrize("name", BLACK_ONES)
def test_what_is_black(name: str, tmp_path: Path):
    record = read_record(save(tmp_path / name, BLACK_ONES[name]))
    assert record.is_black and not record.is_transparent


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not(name: str, tmp_path: Path):
    assert not read_record(save(tmp_path / name, OTHERS[name])).is_black


@pytest.mark.parametrize(
    ("image", "options", "transparent"),
    [
        (Image.new("RGBA", SIZE, (9, 9, 9, 0)), {}, True),
        (Image.new("LA", SIZE, (9, 0)), {}, True),
        (Image.new("P", SIZE, 0), {"transparency": 0}, True),
        (Image.new("RGB", SIZE, (1, 2, 3)), {"transparency": (1, 2, 3)}, True),
        (one_pixel("RGBA", (0, 0, 0, 1), (0, 0, 0, 0)), {}, False),
        (one_pixel("P", 1, 0), {"transparency": 0}, False),
        (Image.new("RGB", SIZE), {}, False),
    ],
)
def test_what_is_transparent(image: Image.Image, options: dict, transparent: bool, tmp_path: Path):
    assert read_record(save(tmp_path / "x.png", image, **options)).is_transparent is transparent


def with_masks(folder: Path, masks: list[Image.Image]) -> Path:
    for number, mask in enumerate(masks):
        save(folder / "images" / f"{number}.png", Image.new("RGB", SIZE, (number, 99, 99)))
        save(folder / "masks" / f"{number}.png", mask)
    return folder / "masks"


@pytest.mark.parametrize("attempt", [1, 2])
def test_some_black_masks_are_a_warning_also_at_the_next_start(attempt: int, tmp_path: Path):
    masks = with_masks(tmp_path, [Image.new("L", SIZE, WHITE), Image.new("L", SIZE, BLACK), Image.new("L", SIZE, BLACK)])
    for _ in range(attempt):
        (warning,) = start(tmp_path, conditioning_data_dir=masks).warnings
    assert warning == (
        f"my.toml, subset 1: 2 of 3 masks (such as {masks / '1.png'}) are black everywhere, so that nothing of their images is "
        "trained: white counts, black does not, and it is the red channel that is read"
    )


def test_nothing_but_black_masks_is_an_error(tmp_path: Path):
    masks = with_masks(tmp_path, [Image.new("L", SIZE, BLACK)] * 2)
    text = problem(tmp_path, conditioning_data_dir=masks)
    assert text.startswith("my.toml, subset 1: 2 of 2 masks") and "white counts" in text and "alpha" not in text


def test_a_mask_that_was_kept_in_the_alpha_channel_is_recognised(tmp_path: Path):
    masks = with_masks(tmp_path, [one_pixel("RGBA", (0, 0, 0, 255), (0, 0, 0, 0))])
    text = problem(tmp_path, conditioning_data_dir=masks)
    assert f"{masks / '0.png'} has an alpha channel: if the mask is in there, save it as a grey picture" in text


def test_black_masks_of_what_validates_do_not_count_for_what_is_trained(tmp_path: Path):
    masks = with_masks(tmp_path, [Image.new("L", SIZE, WHITE)] * 4)
    data = start(tmp_path, conditioning_data_dir=masks, split=0.25)
    assert data.warnings == ()
    save(masks / data.validation[0].path.name, Image.new("L", SIZE, BLACK))
    assert "1 of 4 masks" in start(tmp_path, conditioning_data_dir=masks, split=0.25).warnings[0]
    for item in data.items:
        save(masks / item.path.name, Image.new("L", SIZE, BLACK))
    save(masks / data.validation[0].path.name, Image.new("L", SIZE, WHITE))
    assert "3 of 4 masks" in problem(tmp_path, conditioning_data_dir=masks, split=0.25)


def test_transparent_images_with_alpha_mask(tmp_path: Path):
    save(tmp_path / "images" / "a.png", Image.new("RGBA", SIZE, (9, 9, 9, 0)))
    text = problem(tmp_path, alpha_mask=True)
    assert "1 of 1 images with an alpha channel (such as a.png) are transparent everywhere" in text and "opaque" in text
    save(tmp_path / "images" / "b.png", Image.new("RGB", SIZE))  # counts fully
    (warning,) = start(tmp_path, alpha_mask=True).warnings
    assert "1 of 1 images with an alpha channel" in warning
    assert start(tmp_path).warnings == ()  # without alpha_mask the colours are trained
