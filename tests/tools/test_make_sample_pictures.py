"""Sample pictures: real files of mixed sizes and formats, each with tags, the same every time."""

from __future__ import annotations

from PIL import Image

from tools.make_sample_pictures import make_pictures


def test_twenty_pictures_that_differ(tmp_path):
    paths = make_pictures(tmp_path)
    pictures = [Image.open(path) for path in paths]
    assert len(paths) == 20 and {picture.format for picture in pictures} == {"PNG", "JPEG", "WEBP"}
    assert {path.suffix for path in paths} == {".png", ".jpg", ".jpeg", ".webp"}
    sides = [side for picture in pictures for side in picture.size]
    assert min(sides) >= 200 and max(sides) <= 700
    shapes = {round(width / height, 1) for width, height in (picture.size for picture in pictures)}
    assert min(shapes) < 0.8 and max(shapes) > 1.4 and 1.0 in shapes
    assert len({picture.convert("RGB").resize((16, 16)).tobytes() for picture in pictures}) == 20


def test_captions_are_tags_of_what_was_drawn(tmp_path):
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in make_pictures(tmp_path, 12, scale=0.1)]
    assert all(caption.startswith("tiny scene, ") and caption.count(", ") >= 4 for caption in captions)
    assert len({tag.strip() for caption in captions for tag in caption.split(",")}) > 20


def test_the_same_bytes_every_time(tmp_path):
    first, second = make_pictures(tmp_path / "a", 5, scale=0.2), make_pictures(tmp_path / "b", 5, scale=0.2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
