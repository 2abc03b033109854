"""Which texts an encoder does not take in whole."""

from __future__ import annotations

import pytest

from library.dataset.items import TrainingSet
from library.dataset.token_use import (
    COUNTED,
    TokenLimit,
    TokenUse,
    cut_caption_warnings,
    cut_texts,
    lost_text,
    weight_warnings,
)
from tests.caption_sets import captions


def letters(limit: int):
    return lambda text: (
        TokenUse("many", len(text), 99, None),
        TokenUse("letters", len(text), limit, limit if len(text) > limit else None),
        TokenUse("halves", len(text) // 2, limit, 2 * limit if len(text) // 2 > limit else None),
    )


def test_each_text_once_by_the_encoder_that_sees_least():
    cut = list(cut_texts(["abc", "abcdefghi", "abcdefghi", "abcd"], lambda: letters(4), limit=4))
    assert cut == [("abcdefghi", TokenUse("letters", 9, 4, 4))]
    assert lost_text(*cut[0]) == "has 9 tokens, of which letters takes 4: cut off is 'efghi'"


def test_short_texts_need_no_tokenizer():
    def load():
        raise AssertionError("loaded")

    assert not list(cut_texts(["a cat", ""], load, limit=5))


def test_much_that_is_lost_is_shortened():
    assert lost_text("x" * 300, TokenUse("letters", 300, 10, 10)).endswith(f"cut off is '{'x' * 60}...'")


class Words:
    """A word is a token; five of them count. It knows how often it was asked."""

    asked = 0

    def load(self):
        def lengths(text: str):
            self.asked += 1
            return [(len(text.split()), 5), (1, 3)]

        return lengths

    def warnings(self, training_set: TrainingSet) -> list[str]:
        return list(cut_caption_warnings(training_set, self.load, TokenLimit(5, "shorten them")))


def test_captions_that_are_cut_are_told_in_one_line():
    (warning,) = Words().warnings(captions("a cat", "a b c d e f", "a b c d e f g h", "unforgettable"))
    assert warning == (
        "2 of 4 captions are longer than the 5 tokens that the text encoder takes, and cut (such as that of 2.png, 8 tokens): "
        "shorten them; --show_captions shows what is lost"
    )
    assert Words().warnings(captions("one longer caption", "a b c d e f"))[0].startswith("1 of 2 captions is longer")


def test_a_caption_is_counted_with_what_stands_around_it():
    assert not Words().warnings(captions("a b c d"))
    (warning,) = Words().warnings(captions("a b c d", caption_prefix="p", caption_suffix="s"))
    assert "0.png, 6 tokens" in warning


def test_short_captions_need_no_tokenizer():
    def load():
        raise AssertionError("loaded")

    assert not list(cut_caption_warnings(captions("five!", ""), load, TokenLimit(5, "")))


def test_of_a_large_set_only_some_captions_are_counted():
    few = Words()
    (warning,) = few.warnings(captions(*["one two three four five six"] * 3, *["one longer caption"] * 3000))
    assert few.asked == COUNTED and warning.startswith("at least 3 of 3,003 captions")
    many = Words()
    (warning,) = many.warnings(captions(*["one two three four five six"] * 2000, *["one longer caption"] * 2000))
    assert many.asked <= 2 * COUNTED
    assert warning.startswith("about 2,000 of 4,000 captions")


def test_weights_that_nobody_reads_are_told():
    (warning,) = weight_warnings(captions("a cat", "a (red:1.3) cat", "(masterpiece:1.2), (blue sky:.8)"))
    assert warning.startswith(
        "2 of 3 captions have weights (such as '(red:1.3)' in that of 1.png), which are trained as they stand"
    )


@pytest.mark.parametrize("text", ["miku (vocaloid)", "wide (16:9)", "(at 12:30)", r"\\(red:1.3\\)", "red:1.3"])
def test_brackets_that_are_no_weights(text: str):
    assert not list(weight_warnings(captions(text)))
