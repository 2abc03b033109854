"""Draws about twenty pictures of mixed sizes and formats, each with a caption file, for the quick start and the tests.

    python tools/make_sample_pictures.py OUT_DIR [--count 20] [--scale 1.0]

Each picture is a pure function of its number: a scene (hills, sea, city, ...) under one of several skies, saved as PNG,
JPEG or WebP, with tags that say what was drawn.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw

from library.errors import user_errors_end_the_script
from library.files.atomic import write_atomically, write_text_atomically
from library.randomness import python_random

Colour = tuple[int, int, int]

SIZES = ((512, 512), (640, 448), (448, 640), (384, 384), (700, 394), (300, 500), (256, 256), (576, 432), (210, 280), (480, 600))
FORMATS = (("png", "PNG"), ("jpg", "JPEG"), ("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"))
SKIES: dict[str, tuple[Colour, Colour]] = {  # colours at the top and at the horizon
    "blue sky": ((64, 132, 214), (196, 224, 246)),
    "sunset": ((74, 52, 120), (250, 150, 74)),
    "night": ((8, 10, 34), (36, 44, 92)),
    "overcast": ((132, 140, 150), (206, 210, 214)),
    "dawn": ((110, 150, 200), (252, 204, 190)),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw sample pictures with captions.")
    parser.add_argument("out_dir", type=Path, help="folder for the pictures; made if missing")
    parser.add_argument("--count", type=int, default=20, help="how many pictures")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every side; 0.5 gives pictures for a quick run")
    options = parser.parse_args(argv)
    with user_errors_end_the_script():
        paths = make_pictures(options.out_dir, options.count, scale=options.scale)
        print(f"{len(paths)} pictures with captions in {options.out_dir}")


def make_pictures(out_dir: Path, count: int = 20, *, scale: float = 1.0) -> list[Path]:
    """Draws ``count`` pictures and their ``.txt`` captions; returns the pictures' paths.

    Sides are about 200 to 700 pixels times ``scale``. Raises OutputError when the folder cannot be written.
    """
    return [_make_picture(Path(out_dir), index, scale=scale) for index in range(count)]


def _make_picture(out_dir: Path, index: int, *, scale: float) -> Path:
    rng = python_random("sample picture", index)
    width, height = SIZES[index % len(SIZES)]
    suffix, kind = FORMATS[index % len(FORMATS)]
    size = (max(round(width * scale), 16), max(round(height * scale), 16))
    picture, tags = draw_picture(size, index, rng)
    path = out_dir / f"picture_{index + 1:02d}.{suffix}"
    write_atomically(path, lambda file: picture.save(file, kind, quality=92))
    write_text_atomically(path.with_suffix(".txt"), ", ".join(tags) + "\n")
    return path


def draw_picture(size: tuple[int, int], index: int, rng: random.Random) -> tuple[Image.Image, list[str]]:
    """An RGB picture of ``size`` (width, height) and the tags of what is on it."""
    scene_name, scene = list(SCENES.items())[index % len(SCENES)]
    sky_name = list(SKIES)[(index // 2) % len(SKIES)]
    picture = _sky(size, *SKIES[sky_name])
    draw = ImageDraw.Draw(picture)
    tags = ["tiny scene", scene_name, sky_name, *_sky_light(draw, size, sky_name, rng), *scene(draw, size, rng)]
    width, height = size
    tags.append("square" if width == height else "wide" if width > height else "tall")
    return picture, tags


def _sky(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    column = Image.new("RGB", (1, 64))
    for row in range(64):
        column.putpixel((0, row), _between(top, bottom, row / 63))
    return column.resize(size, Image.Resampling.BICUBIC)


def _between(first: Colour, second: Colour, part: float) -> Colour:
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _sky_light(draw: ImageDraw.ImageDraw, size: tuple[int, int], sky_name: str, rng: random.Random) -> list[str]:
    width, height = size
    x, y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.12, 0.3) * height
    radius = rng.uniform(0.05, 0.09) * min(size)
    if sky_name == "overcast":
        for step in range(4):
            _ellipse(draw, x + step * radius * 1.1, y, radius * 1.4, radius * 0.8, (224, 226, 230))
        return ["clouds"]
    if sky_name == "night":
        for _ in range(40):
            star_x, star_y = rng.random() * width, rng.random() * 0.6 * height
            _ellipse(draw, star_x, star_y, 1.0, 1.0, (240, 240, 255))
        _ellipse(draw, x, y, radius, radius, (236, 236, 214))
        return ["moon", "stars"]
    _ellipse(draw, x, y, radius, radius, (255, 236, 150))
    return ["sun"]


def _ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, across: float, down: float, colour: Colour) -> None:
    draw.ellipse((x - across, y - down, x + across, y + down), fill=colour)


def _hills(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> list[str]:
    width, height = size
    for layer, colour in enumerate(((92, 128, 116), (66, 112, 72), (44, 92, 48))):
        base, swing = (0.5 + 0.15 * layer) * height, 0.09 * height
        phase, waves = rng.uniform(0, 6.3), rng.uniform(1.0, 2.5)
        ridge = [(x, base + swing * math.sin(phase + waves * 6.28 * x / width)) for x in range(0, width + 8, 8)]
        draw.polygon([*ridge, (width, height), (0, height)], fill=colour)
    return ["green hills", "grass"]


def _sea(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> list[str]:
    width, height = size
    draw.rectangle((0, 0.58 * height, width, height), fill=(28, 84, 132))
    for _ in range(30):
        x, y = rng.random() * width, rng.uniform(0.6, 1.0) * height
        draw.line((x, y, x + 0.08 * width, y), fill=(92, 150, 190), width=2)
    x, y, side = rng.uniform(0.25, 0.7) * width, 0.62 * height, 0.16 * min(size)
    draw.polygon(
        [(x - side, y), (x + side, y), (x + 0.6 * side, y + 0.4 * side), (x - 0.6 * side, y + 0.4 * side)], fill=(110, 60, 40)
    )
    draw.polygon([(x, y - 0.1 * side), (x, y - 1.8 * side), (x + 0.9 * side, y - 0.1 * side)], fill=(244, 240, 230))
    return ["sailing boat", "waves"]


def _city(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> list[str]:
    width, height = size
    left = 0.0
    while left < width:
        across, top = rng.uniform(0.08, 0.16) * width, rng.uniform(0.3, 0.7) * height
        grey = rng.randint(50, 110)
        draw.rectangle((left, top, left + across, height), fill=(grey, grey, grey + 16))
        _windows(draw, (left, top, left + across, height), rng)
        left += across + 2
    return ["houses", "windows"]


def _windows(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], rng: random.Random) -> None:
    left, top, right, bottom = box
    step = max((right - left) / 4, 4)
    for row in range(int((bottom - top) / step)):
        for column in range(3):
            x, y = left + (column + 0.6) * step, top + (row + 0.4) * step
            lit = rng.random() < 0.6
            draw.rectangle((x, y, x + step / 2, y + step / 2), fill=(250, 220, 120) if lit else (40, 44, 60))


def _forest(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> list[str]:
    width, height = size
    draw.rectangle((0, 0.7 * height, width, height), fill=(74, 96, 52))
    for _ in range(14):
        x, foot, tall = rng.random() * width, rng.uniform(0.72, 0.98) * height, rng.uniform(0.25, 0.45) * height
        draw.rectangle((x - 0.03 * tall, foot - 0.2 * tall, x + 0.03 * tall, foot), fill=(92, 62, 40))
        green = (rng.randint(16, 50), rng.randint(84, 130), rng.randint(40, 66))
        draw.polygon([(x, foot - tall), (x - 0.25 * tall, foot - 0.15 * tall), (x + 0.25 * tall, foot - 0.15 * tall)], fill=green)
    return ["pine trees"]


def _flowers(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> list[str]:
    width, height = size
    draw.rectangle((0, 0.45 * height, width, height), fill=(96, 150, 70))
    name, colour = rng.choice(
        (("red flowers", (210, 50, 60)), ("white flowers", (245, 245, 240)), ("violet flowers", (150, 80, 190)))
    )
    for _ in range(26):
        x, y, petal = rng.random() * width, rng.uniform(0.5, 0.97) * height, rng.uniform(0.015, 0.03) * min(size)
        for turn in range(5):
            angle = turn * 2 * math.pi / 5
            _ellipse(draw, x + 1.4 * petal * math.cos(angle), y + 1.4 * petal * math.sin(angle), petal, petal, colour)
        _ellipse(draw, x, y, petal, petal, (250, 210, 60))
    return ["meadow", name]


def _balloons(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> list[str]:
    width, height = size
    colours: tuple[Colour, ...] = ((214, 60, 60), (250, 190, 60), (70, 150, 90), (80, 100, 200))
    for colour in rng.sample(colours, 3):
        x, y, radius = rng.uniform(0.15, 0.85) * width, rng.uniform(0.25, 0.7) * height, rng.uniform(0.08, 0.14) * min(size)
        draw.line((x - 0.4 * radius, y, x, y + 2 * radius), fill=(70, 60, 50), width=1)
        draw.line((x + 0.4 * radius, y, x, y + 2 * radius), fill=(70, 60, 50), width=1)
        _ellipse(draw, x, y, radius, 1.2 * radius, colour)
        draw.rectangle((x - 0.2 * radius, y + 1.7 * radius, x + 0.2 * radius, y + 2.1 * radius), fill=(120, 84, 50))
    draw.rectangle((0, 0.9 * height, width, height), fill=(88, 120, 70))
    return ["hot air balloons", "flying"]


Scene = Callable[[ImageDraw.ImageDraw, tuple[int, int], random.Random], list[str]]
SCENES: dict[str, Scene] = {
    "landscape": _hills,
    "sea": _sea,
    "city": _city,
    "forest": _forest,
    "garden": _flowers,
    "sky": _balloons,
}


if __name__ == "__main__":
    main()
