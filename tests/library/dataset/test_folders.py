"""Image folders and their captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.dataset.folders import (
    ALWAYS_READ,
    CUT,
    EMPTY,
    MISSING,
    CaptionText,
    caption_paths,
    folder_problem,
    image_extensions,
    layout_problem,
    list_images,
    named_folders,
    printable,
    read_caption,
    text_problem,
    unread_images_warning,
)
from library.dataset.items import SubsetSettings
from library.errors import DatasetError


def subset(**settings) -> SubsetSettings:
    return SubsetSettings(**{"place": "my.toml, subset 1", "image_dir": None, "caption_extension": ".txt"} | settings)


def make_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)
    return path


def test_listing_is_sorted_flat_and_ignores_case(tmp_path: Path):
    names = ["b.PNG", "a.jpg", "c.JpEg", "日本.webp", "d.bmp"]
    for name in [*names, ".hidden.png", "._b.png", "note.txt", "deep/e.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path, ALWAYS_READ)] == sorted(names)


def test_extensions_include_what_pillow_can_read():
    extensions = image_extensions()
    assert set(ALWAYS_READ) <= set(extensions)
    assert (".avif" in extensions) == (".avif" in Image.registered_extensions())


def test_images_that_cannot_be_read_here_are_named(tmp_path: Path):
    (tmp_path / "x.jxl").touch()
    assert "1 .jxl (pip install pillow-jxl-plugin)" in (unread_images_warning(tmp_path, ["x.jxl"], ALWAYS_READ) or "")
    assert unread_images_warning(tmp_path, ["x.jxl"], (*ALWAYS_READ, ".avif", ".jxl")) is None
    assert "pip install pillow-jxl-plugin" in folder_problem(tmp_path, ALWAYS_READ)


def test_known_kinds_of_pictures_that_are_not_read_are_counted_with_what_to_do(tmp_path: Path):
    names = ["a.GIF", "b.gif", "c.tiff", "d.jfif", "e.png", "f.txt", "._g.gif", "h.heic"]
    assert unread_images_warning(tmp_path, names, ALWAYS_READ) == (
        f"{tmp_path}: pictures of these kinds are not read and are left out: 1 .jfif (rename to .jpg), "
        "2 .gif, 1 .heic, 1 .tiff (convert to .png or .webp)"
    )
    (tmp_path / "a.gif").touch()
    assert folder_problem(tmp_path, ALWAYS_READ).endswith("; not read: 1 .gif (convert to .png or .webp)")


def test_caption_is_the_first_line_with_text(tmp_path: Path):
    image = tmp_path / "a.b.png"
    (tmp_path / "a.b.txt").write_bytes("\ufeff  赤い, cat \r\nsecond\r\n\r\n third ".encode())
    assert read_caption(image, subset()) == ("赤い, cat", CUT)
    assert read_caption(image, subset(enable_wildcard=True)) == ("赤い, cat\nsecond\nthird", "")
    assert read_caption(image, subset(caption_extension=".caption")) == ("", MISSING)
    (tmp_path / "a.b.txt").write_text("\n one line\n\n")
    assert read_caption(image, subset()) == CaptionText("one line")


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_caption_file_is_an_empty_caption(content: bytes, tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_caption(tmp_path / "a.png", subset()) == ("", EMPTY)


def test_caption_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("ab é".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"a\.txt: byte 3 is not UTF-8: save"):
        read_caption(tmp_path / "a.png", subset())
    (tmp_path / "a.txt").write_bytes("ab".encode("utf-16"))
    with pytest.raises(DatasetError, match="looks like UTF-16"):
        read_caption(tmp_path / "a.png", subset())


def test_folder_without_images_names_what_was_looked_for(tmp_path: Path):
    assert ".png, .jpg" in folder_problem(tmp_path, ALWAYS_READ)
    make_image(tmp_path / "inner" / "x.png")
    assert "sub-folders are not searched, but inner has images" in folder_problem(tmp_path, ALWAYS_READ)


def test_named_folders(tmp_path: Path):
    for name in ("10_a cat_b", "3", "0_none", "x_cat", "cat", "-1_x", ".git"):
        (tmp_path / name).mkdir()
    found, ignored = named_folders(tmp_path)
    assert [(folder.path.name, folder.repeats, folder.class_tokens) for folder in found] == [
        ("10_a cat_b", 10, "a cat_b"),
        ("3", 3, ""),
    ]
    assert ignored == ["-1_x", "0_none", "cat", "x_cat"]


def test_layout_is_explained(tmp_path: Path):
    assert "has no sub-folders" in layout_problem("--train_data_dir", tmp_path, [])
    assert "only cat" in layout_problem("--train_data_dir", tmp_path, ["cat"])
    make_image(tmp_path / "x.png")
    text = layout_problem("--train_data_dir", tmp_path, [])
    assert "has images directly inside" in text and "N_name" in text


def test_captions_of_face_crops(tmp_path: Path):
    (tmp_path / "girl.txt").write_text("whole picture")
    (tmp_path / "girl_1_2_3_4.txt").write_text("own")
    assert read_caption(tmp_path / "girl_1_2_3_4.png", subset()).text == "own"
    assert read_caption(tmp_path / "girl_10_20_30_40.png", subset()).text == "whole picture"
    assert read_caption(tmp_path / "girl_in_a_red_dress.png", subset()).note == MISSING
    assert list(caption_paths("/some_data_of_2_3_4_5/x.png", ".txt")) == ["/some_data_of_2_3_4_5/x.txt"]


def test_a_caption_file_that_is_a_folder(tmp_path: Path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DatasetError, match=r"a\.txt is a folder, but a caption file of that name would be read"):
        read_caption(tmp_path / "a.png", subset())


@pytest.mark.parametrize(("name", "shown"), [("a\udcff.png", r"a\xff.png"), ("a\ud800.png", r"a\ud800.png")])
def test_names_that_are_no_text(name: str, shown: str):
    assert printable(name) == shown
    assert text_problem(name) == f"the name {shown} is not valid UTF-8: rename it"
    assert text_problem("日本.png") is None and printable("日本.png") == "日本.png"


def test_names_that_would_break_a_line():
    shown = printable("a\nb\t\x1b[31m\x7f\u2028 c\xa0d\u3000.png")
    assert shown == r"a\nb\t\x1b[31m\x7f\u2028 c" + "\xa0d\u3000.png"
    assert printable(shown) == shown and printable("\udcff\n") == r"\xff\n"
