"""Which texts an encoder does not take in whole."""

from __future__ import annotations

from library.dataset.token_use import TokenUse, cut_texts, lost_text


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
