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


def test_blocks_that_the_model_has_not():
    check_indices("train_block_indices", frozenset({0, 23}), blocks=24)
    with pytest.raises(
        NetworkError, match="train_block_indices names block 24 and others, and the model has 24: give numbers from 0 to 23"
    ):
        check_indices("train_block_indices", frozenset({1, 24, 30}), blocks=24)
