"""Lists of blocks as arguments write them."""

from __future__ import annotations

import re

import pytest

from library.errors import NetworkError
from networks.block_indices import check_indices, other_blocks, parse_block_indices


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0-5,8", {0, 1, 2, 3, 4, 5, 8}),
        (" 3 ", {3}),
        ("1 - 2, 2", {1, 2}),
        ("[0,11]", {0, 11}),
        ("none", set()),
        ("", set()),
    ],
)
def test_lists(text, wanted):
    assert parse_block_indices(text) == wanted


def test_all_is_no_choice():
    assert parse_block_indices("ALL") is None and other_blocks("layers", None) == ()
    check_indices("x", None, blocks=1)


@pytest.mark.parametrize("text", ["-1", "1-", "a", "0;1", "1,,2", "1.5"])
def test_what_is_no_list(text):
    with pytest.raises(ValueError, match="is no block: give all, none, or numbers and ranges"):
        parse_block_indices(text)


def test_the_other_blocks():
    (pattern,) = other_blocks("layers", frozenset({1, 12}))
    left = {n for n in range(130) if re.fullmatch(pattern, f"layers.{n}.attention.out")}
    assert left == set(range(130)) - {1, 12}
    (pattern,) = other_blocks("layers", frozenset())
    assert re.fullmatch(pattern, "layers.0.x") and not re.fullmatch(pattern, "noise_refiner.layers.0.x")


@pytest.mark.parametrize(
    ("given", "blocks", "said"),
    [("0-40", 3, "0-40 goes past the last block, 2: give numbers from 0 to 2"), ("1,24,30", 24, "24, 30 go past the last block, 23"),
     ("0-3,22-24", 24, "train_block_indices: 22-24 goes past the last block, 23")],
)  # fmt: skip
def test_blocks_that_the_model_has_not(given, blocks, said):
    check_indices("train_block_indices", frozenset({0, 23}), blocks=24)
    with pytest.raises(NetworkError, match=said):
        check_indices("train_block_indices", parse_block_indices(given), blocks=blocks)
