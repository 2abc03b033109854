"""Reading text that a user saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.errors import DatasetError, OptionError
from library.files.text_file import read_utf8


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nx")
    assert read_utf8(path, error=DatasetError) == "café\r\nx"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9", "byte 3 is not UTF-8: save the file as UTF-8"),
        ("a".encode("utf-16"), "byte 0 is not UTF-8 (it looks like UTF-16)"),
    ],
)
def test_other_encodings_are_told(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        read_utf8(path, error=DatasetError)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_the_flag_that_named_the_file_is_told(tmp_path: Path):
    with pytest.raises(OptionError, match=r"^--sample_prompts .*gone\.txt cannot be read: "):
        read_utf8(tmp_path / "gone.txt", error=OptionError, flag="--sample_prompts")
