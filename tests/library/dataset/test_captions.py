"""Captions with random parts: what changes, what never does, and that every choice is a pure function."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from library.dataset.captions import (
    caption_for,
    caption_variant,
    is_dropped,
    is_random,
    possible_variants,
    render_caption,
    variant_for,
)
from library.dataset.items import Item, SubsetSettings


def subset(**settings) -> SubsetSettings:
    return SubsetSettings(place="test", image_dir=None, **settings)


def item(caption: str = "a, b, c, d", key: str = "0:0:x.png", **settings) -> Item:
    return Item(index=0, key=key, path=Path("x.png"), caption=caption, dataset_index=0, subset=subset(**settings), repeats=1,
                size_wh=(64, 64), bucket_wh=(64, 64), resized_wh=(64, 64), crop_left_top=(0, 0))  # fmt: skip


def renderings(caption: str, count: int = 200, **settings) -> Counter[str]:
    return Counter(render_caption(caption, subset(**settings), random.Random(seed)) for seed in range(count))


def test_shuffling_moves_every_tag_but_the_kept_ones():
    texts = renderings("k1, k2, a, b, c", shuffle_caption=True, keep_tokens=2)
    assert len(texts) == 6 and all(text.startswith("k1, k2, ") for text in texts)


def test_marker_keeps_head_and_tail():
    texts = renderings("h ||| a, b ||| t1, t2", shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=5)
    assert set(texts) == {"h, a, b, t1, t2", "h, b, a, t1, t2"}


def test_keep_tokens_counts_where_the_marker_is_absent():
    assert set(renderings("a, b, c", shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=2)) == {"a, b, c"}


def test_tag_dropout_drops_about_its_rate():
    kept = sum(len(text.split(", ")) * n for text, n in renderings("k, " + ", ".join("abcdefgh"), 300, keep_tokens=1,
                                                                   caption_tag_dropout_rate=0.25).items())  # fmt: skip
    assert kept / 300 == pytest.approx(1 + 8 * 0.75, abs=0.3)


def test_wildcards_choose_alternatives_and_lines():
    texts = renderings("a {red|blue} cat\n{{literal}} dog", enable_wildcard=True, caption_prefix="pre", caption_suffix="post")
    assert set(texts) == {"pre a red cat post", "pre a blue cat post", "pre {literal} dog post"}


def test_secondary_separator_survives_shuffling():
    assert set(renderings("a;;;b, c", shuffle_caption=True, secondary_separator=";;;")) == {"a,b, c", "c, a,b"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"caption_dropout_rate": 0.5}, False),
        ({"caption_tag_dropout_rate": 1.0}, False),
        ({"caption_tag_dropout_rate": 0.5}, True),
        ({"shuffle_caption": True}, True),
        ({"enable_wildcard": True}, True),
    ],
)
def test_is_random(settings: dict, expected: bool):
    assert is_random(subset(**settings)) is expected


@pytest.mark.parametrize(
    ("caption", "settings"),
    [
        ("a, b, c", {"shuffle_caption": True}),
        ("a, b, c", {"shuffle_caption": True, "keep_tokens": 2}),
        ("a, b, c", {"caption_tag_dropout_rate": 0.5}),
        ("a, b", {"shuffle_caption": True, "caption_tag_dropout_rate": 0.5}),
        ("{a|b} {c|d|e}", {"enable_wildcard": True}),
        ("{a|b, c}, d\nsecond", {"enable_wildcard": True, "shuffle_caption": True}),
        ("plain", {"enable_wildcard": True}),
        ("one", {"shuffle_caption": True}),
        ("", {"shuffle_caption": True}),
    ],
)
def test_possible_variants_is_an_upper_bound(caption: str, settings: dict):
    found = len(renderings(caption, 400, **settings))
    bound = possible_variants(item(caption, **settings), limit=1000)
    assert found <= bound <= 4 * found
    assert possible_variants(item(caption, **settings), limit=3) == min(bound, 3)


def test_dropout_rate_and_epochs():
    dropped = sum(is_dropped(item(caption_dropout_rate=0.3), seed=1, epoch=1, occurrence=n) for n in range(2000))
    assert dropped / 2000 == pytest.approx(0.3, abs=0.04)
    every_second = item(caption_dropout_every_n_epochs=2)
    assert [is_dropped(every_second, seed=1, epoch=epoch, occurrence=0) for epoch in (1, 2, 3, 4)] == [False, True, False, True]
    assert caption_for(every_second, seed=1, epoch=2, occurrence=0) == ""


def test_live_captions_differ_by_showing_seed_and_item():
    many = item(", ".join("abcdefgh"), shuffle_caption=True)
    other = item(", ".join("abcdefgh"), key="0:0:y.png", shuffle_caption=True)
    first = caption_for(many, seed=1, epoch=1, occurrence=0)
    assert first == caption_for(many, seed=1, epoch=1, occurrence=0)
    assert len({first, caption_for(many, seed=1, epoch=1, occurrence=1), caption_for(many, seed=2, epoch=1, occurrence=0),
                caption_for(other, seed=1, epoch=1, occurrence=0)}) == 4  # fmt: skip


def test_variants_differ_and_are_walked_through_evenly():
    many = item(", ".join("abcdefgh"), shuffle_caption=True)
    assert len({caption_variant(many, variant) for variant in range(10)}) == 10
    chosen = [variant_for(many, seed=1, epoch=1, occurrence=n, variants=10) for n in range(100)]
    assert set(Counter(chosen).values()) == {10}
    assert all(set(chosen[start : start + 10]) == set(range(10)) for start in range(0, 100, 10))
    assert chosen[:10] != chosen[10:20]
    assert chosen != [variant_for(many, seed=2, epoch=1, occurrence=n, variants=10) for n in range(100)]
    assert variant_for(many, seed=1, epoch=1, occurrence=7, variants=1) == 0


def test_random_caption_without_a_random_source_is_our_mistake():
    with pytest.raises(ValueError, match="random source"):
        render_caption("a, b", subset(shuffle_caption=True), None)
    assert render_caption("a, b\nc", subset(), None) == "a, b"
