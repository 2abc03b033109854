"""Sizes as the command line writes them."""

import pytest

from library.options.dataset import parse_resolution


@pytest.mark.parametrize(("text", "size"), [("1024", (1024, 1024)), ("832,1216", (832, 1216)), (" 832 , 1216 ", (832, 1216))])
def test_resolution(text, size):
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "0", "1024x1024", "1,2,3", "-512", "512,", "12.5", "512,0"])
def test_resolution_that_is_none(text):
    with pytest.raises(ValueError, match="give N or WIDTH,HEIGHT in pixels"):
        parse_resolution(text)
