"""Captions with random parts: what changes, what never does, and that every choice is a pure function."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from library.dataset.captions import (
    Moment,
    caption_for,
    caption_variant,
    is_dropped,
    is_random,
    possible_variants,
    render_caption,
    variant_for,
    warmed_up_tags,
)
from library.dataset.items import Item, SubsetSettings
from library.dataset.validation_split import without_chance


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


def test_another_separator_cuts():
    texts = renderings("a, b; c", shuffle_caption=True, caption_separator=";")
    assert set(texts) == {"a, b, c", "c, a, b"}  # joined by commas, as the reference does


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


TAGS = "t1, t2, t3, t4, t5"


def at_step(step: int, caption: str = TAGS, total_steps: int = 100, **settings) -> str:
    return caption_for(item(caption, **settings), seed=1, epoch=1, occurrence=0, moment=Moment(step, total_steps))


def test_tags_warm_up_with_the_steps():
    texts = [at_step(step, token_warmup_step=10, token_warmup_min=2) for step in range(12)]
    assert [len(text.split(", ")) for text in texts] == [2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]
    assert all(TAGS.startswith(text) for text in texts)


def test_a_share_of_the_run_is_that_many_steps():
    for total_steps, share, steps in ((100, 0.3, 30), (7, 0.5, 3), (1, 0.5, 0)):
        for step in range(steps + 2):
            settings = {"token_warmup_min": 1}
            whole = at_step(step, total_steps=total_steps, token_warmup_step=steps, **settings) if steps else TAGS
            assert at_step(step, total_steps=total_steps, token_warmup_step=share, **settings) == whole


@pytest.mark.parametrize("fewest", [0, 1, 3, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_warm_up_only_adds_tags_and_never_more_than_there_are(count: int, fewest: int):
    settings = subset(token_warmup_step=13, token_warmup_min=fewest)
    used = [warmed_up_tags(count, settings, Moment(step, 100)) for step in range(20)]
    assert used == sorted(used)
    assert used[0] == min(fewest, count)
    assert set(used[13:]) == {count}


def test_kept_tags_and_the_tail_are_there_from_the_first_step():
    assert at_step(0, "k1, k2, a, b, c", token_warmup_step=10, keep_tokens=2) == "k1, k2, a"
    marked = {"token_warmup_step": 10, "keep_tokens_separator": "|||", "token_warmup_min": 1}
    assert at_step(0, "h ||| a, b, c ||| tail", **marked) == "h, a, tail"


def test_warm_up_takes_the_first_tags_and_shuffles_those():
    texts = {
        caption_for(item(TAGS, token_warmup_step=10, token_warmup_min=3, shuffle_caption=True), seed=1, epoch=1, occurrence=n,
                    moment=Moment(0, 100))
        for n in range(100)
    }  # fmt: skip
    assert len(texts) == 6
    assert {frozenset(text.split(", ")) for text in texts} == {frozenset(("t1", "t2", "t3"))}


def test_warm_up_is_over_where_no_moment_is_told():
    warming = item("t1 ,t2,t3", token_warmup_step=10)
    assert caption_for(warming, seed=1, epoch=1, occurrence=0) == caption_variant(warming, 0) == "t1, t2, t3"
    assert not is_random(warming.subset)
    assert possible_variants(warming, limit=99) == 1


def test_tags_are_joined_for_validation_as_training_has_them():
    text = "h ||| a ,b ||| t"
    trained = subset(shuffle_caption=True, keep_tokens_separator="|||")
    assert render_caption(text, without_chance(trained), None) == "h, a, b, t"
    untouched = subset(keep_tokens_separator="|||")
    assert render_caption(text, without_chance(untouched), None) == text


EMPHASIS = r"(red:1.2), [blue], ((very large)), \(literal\), (a, b:1.3)"


@pytest.mark.parametrize("settings", [{}, {"enable_wildcard": True}, {"caption_dropout_rate": 0.0, "keep_tokens": 1}])
def test_emphasis_passes_untouched(settings: dict):
    assert caption_for(item(EMPHASIS, **settings), seed=1, epoch=1, occurrence=0) == EMPHASIS


def test_emphasis_is_cut_at_its_commas_where_tags_are_split():
    tags = caption_for(item(EMPHASIS, shuffle_caption=True), seed=1, epoch=1, occurrence=0).split(", ")
    assert sorted(tags) == sorted(["(red:1.2)", "[blue]", "((very large))", r"\(literal\)", "(a", "b:1.3)"])


def test_wildcards_are_one_level_deep():
    assert set(renderings("{a|{b|c} }", enable_wildcard=True)) == {"a }", "{b }", "c }"}
    assert set(renderings("{{{a|b} }}", enable_wildcard=True)) == {"{a }", "{b }"}


def test_a_wildcard_may_hold_several_tags():
    texts = renderings("k, {a, b|c}", enable_wildcard=True, shuffle_caption=True, keep_tokens=1)
    assert set(texts) == {"k, a, b", "k, b, a", "k, c"}


def test_nothing_random_needs_no_random_source():
    plain = subset(caption_prefix="p", caption_suffix="s", token_warmup_step=3, caption_tag_dropout_rate=1.0, keep_tokens=1)
    assert render_caption("a, b s", plain, None, moment=Moment(0, 9)) == "p a"


def test_captions_do_not_depend_on_the_order_of_asking():
    """Dropout, shuffling, tag dropout, wildcards and variants of many showings: forwards, backwards, and each on its own."""
    many = [
        item("k, {a|b|c}, d, e\nsecond, line", key=f"0:0:{name}", shuffle_caption=True, enable_wildcard=True, keep_tokens=1,
             caption_tag_dropout_rate=0.3, caption_dropout_rate=0.3, token_warmup_step=50)
        for name in "abc"
    ]  # fmt: skip
    showings = [(one, epoch, 2 * (epoch - 1) + repeat) for one in many for epoch in (1, 2, 3) for repeat in (0, 1)]

    def choose(showing: tuple[Item, int, int]) -> tuple:
        one, epoch, occurrence = showing
        when = {"seed": 5, "epoch": epoch, "occurrence": occurrence}
        return (caption_for(one, **when, moment=Moment(epoch, 100)), is_dropped(one, **when),
                variant_for(one, **when, variants=7), caption_variant(one, occurrence))  # fmt: skip

    forwards = [choose(showing) for showing in showings]
    assert [choose(showing) for showing in reversed(showings)] == forwards[::-1]
    assert len(set(forwards)) > len(forwards) // 2
