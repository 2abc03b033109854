"""Picture files of every kind: which way up, colours, opacity, and the red of masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.picture_file import alpha, loaded_upright, opened, red, rgb
from library.dataset.verify import read_record
from library.errors import DatasetError

RED, GREEN, BLUE = (220, 30, 40), (30, 200, 60), (20, 40, 210)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Red left half, green top right, blue bottom right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (width // 2, height // 2, width, height))
    return image


def read_rgb(path: Path) -> np.ndarray:
    with opened(path) as image:
        return np.asarray(rgb(loaded_upright(image)))


def read_channel(path: Path, channel) -> np.ndarray | None:
    with opened(path) as image:
        found = channel(loaded_upright(image))
    assert found is None or found.mode == "L"
    return None if found is None else np.asarray(found)


def near(pixel: np.ndarray, colour: tuple[int, int, int], *, within: int = 12) -> bool:
    return bool(np.abs(pixel.astype(int) - np.array(colour)).max() <= within)


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.JPEG", "d.webp", "e.BMP", "赤い絵 é.PNG"])
def test_formats(name: str, tmp_path: Path):
    path = tmp_path / name
    picture().save(path, quality=95)
    assert read_record(path).size_wh == (60, 40)
    pixels = read_rgb(path)
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    assert near(pixels[20, 10], RED) and near(pixels[8, 50], GREEN) and near(pixels[32, 50], BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_orientation(orientation: int, suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    # The file holds the picture as the camera sensor saw it: the inverse of what the viewer must do.
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = picture() if orientation == 1 else picture().transpose(Image.Transpose[undo[orientation]])
    stored.save(path, exif=exif, quality=95)
    assert read_record(path).size_wh == (60, 40)
    pixels = read_rgb(path)
    assert near(pixels[20, 10], RED) and near(pixels[8, 50], GREEN) and near(pixels[32, 50], BLUE)


def test_damaged_exif_is_ignored(tmp_path: Path):
    path = tmp_path / "x.jpg"
    picture().save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    assert read_record(path).size_wh == (60, 40) and read_rgb(path).shape == (40, 60, 3)


def test_alpha_is_dropped_not_blended(tmp_path: Path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (20, 20), (*GREEN, 0)).save(path)
    assert np.array_equal(read_rgb(path)[5, 5], GREEN)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80"])
def test_palette_with_transparency(transparency, tmp_path: Path):
    path = tmp_path / "x.png"
    image = Image.new("P", (20, 20), 1)
    image.putpalette([*RED, *BLUE])
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    assert read_record(path).size_wh == (20, 20)
    assert np.array_equal(read_rgb(path)[5, 5], BLUE)


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("LA", (77, 3)), ("1", 1)])
def test_grey(mode: str, colour, tmp_path: Path):
    path = tmp_path / "x.png"
    Image.new(mode, (20, 20), colour).save(path)
    assert np.array_equal(read_rgb(path)[5, 5], [77 if mode != "1" else 255] * 3)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path):
    path = tmp_path / "x.png"
    ramp = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(ramp).save(path)
    assert np.abs(read_rgb(path)[..., 0] - ramp / 257).max() <= 0.5


def test_cmyk(tmp_path: Path):
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(path, quality=95)
    assert read_record(path).size_wh == (32, 32)
    assert near(read_rgb(path)[5, 5], (255, 0, 0))


def test_animation_shows_its_first_frame(tmp_path: Path):
    path = tmp_path / "x.webp"
    picture().save(path, save_all=True, append_images=[Image.new("RGB", (60, 40), BLUE)], lossless=True)
    assert np.array_equal(read_rgb(path)[20, 10], RED)


def test_gif_under_another_name(tmp_path: Path):
    path = tmp_path / "x.png"
    frames = [Image.new("P", (20, 20), 0), Image.new("P", (20, 20), 1)]
    for frame in frames:
        frame.putpalette([*RED, *BLUE])
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_rgb(path)[5, 5], RED)


def deep_rgba(path: Path) -> None:
    """A PNG with 16 bits in each of four channels, which Pillow reads but does not write."""
    import cv2

    pixels = np.zeros((20, 20, 4), np.uint16)
    pixels[..., 0], pixels[..., 2], pixels[..., 3] = 65535, 257 * 77, 257 * 128  # blue, red, alpha
    assert cv2.imwrite(str(path), pixels)


def test_sixteen_bit_colours_with_alpha(tmp_path: Path):
    path = tmp_path / "x.png"
    deep_rgba(path)
    assert np.array_equal(read_rgb(path)[5, 5], (77, 0, 255))
    assert np.unique(read_channel(path, alpha)).tolist() == [128]
    assert np.unique(read_channel(path, red)).tolist() == [77]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "colour", "settings", "expected"),
    [
        ("RGBA", (1, 2, 3, 70), {}, 70),
        ("LA", (9, 70), {}, 70),
        ("L", 9, {"transparency": 9}, 0),
        ("L", 9, {"transparency": 8}, 255),
        ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, 0),
        ("1", 1, {"transparency": 1}, 0),
        ("I;16", 300, {"transparency": 300}, 0),
        ("I;16", 300, {"transparency": 44}, 255),
        ("RGB", (1, 2, 3), {}, None),
        ("L", 9, {}, None),
    ],
)
def test_opacity(mode: str, colour, settings: dict, expected: int | None, tmp_path: Path):
    path = tmp_path / "x.png"
    Image.new(mode, (20, 20), colour).save(path, **settings)
    found = read_channel(path, alpha)
    assert (None if found is None else np.unique(found).tolist()) == (None if expected is None else [expected])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_opacity_of_a_palette(transparency, tmp_path: Path):
    path = tmp_path / "x.png"
    image = Image.new("P", (20, 20), 0)
    image.paste(1, (0, 0, 10, 20))
    image.putpalette([*RED, *BLUE])
    image.save(path, transparency=transparency)
    found = read_channel(path, alpha)
    assert found is not None and np.all(found[:, :10] == 0) and np.all(found[:, 10:] == 255)
    assert np.array_equal(read_rgb(path)[5, 5], BLUE)  # the colours as stored, however transparent


def test_opacity_in_webp(tmp_path: Path):
    path = tmp_path / "x.webp"
    Image.new("RGBA", (20, 20), (*GREEN, 70)).save(path, lossless=True, exact=True)
    assert np.unique(read_channel(path, alpha)).tolist() == [70]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, 77),
        ("LA", (77, 3), 77),
        ("RGB", (77, 0, 255), 77),
        ("RGBA", (77, 0, 255, 0), 77),  # a mask's alpha says nothing
        ("1", 1, 255),
        ("I;16", 257 * 77, 77),
        ("P", 1, BLUE[0]),
    ],
)
def test_red_of_every_mode(mode: str, colour, expected: int, tmp_path: Path):
    path = tmp_path / "x.png"
    image = Image.new(mode, (20, 20), colour)
    if mode == "P":
        image.putpalette([*RED, *BLUE])
    image.save(path)
    assert np.unique(read_channel(path, red)).tolist() == [expected]


def test_reading_leaves_the_picture_as_it_was(tmp_path: Path):
    """Its transparency is still there when the colours are asked for first."""
    path = tmp_path / "x.png"
    image = Image.new("P", (20, 20), 0)
    image.putpalette([*RED, *BLUE])
    image.save(path, transparency=0)
    with opened(path) as file:
        rgb(file)
        opacity = alpha(file)
    assert opacity is not None and opacity.getpixel((5, 5)) == 0


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_truncated_file_is_named(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    Image.effect_noise((100, 100), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        read_rgb(path)
    assert str(path) in str(caught.value)


def test_postscript_is_not_run_whatever_it_is_named(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_rgb, read_record):
        with pytest.raises(DatasetError, match="no image that Pillow knows"):
            read(path)
