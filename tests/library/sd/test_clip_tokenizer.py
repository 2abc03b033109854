from __future__ import annotations

import subprocess
import sys
import time

import pytest

from library.dataset.token_use import TokenUse
from library.errors import OptionError
from library.sd.clip_tokenizer import (
    CLIP_L,
    END_ID,
    OPEN_CLIP_G,
    OPEN_CLIP_H,
    START_ID,
    ClipTokenizer,
    cleaned,
    load_tokenizers,
)

HUNDRED = " ".join(["cat"] * 100)
CAT = 2368


@pytest.fixture(scope="module")
def tokenizers() -> tuple[ClipTokenizer, ...]:
    return load_tokenizers(CLIP_L, OPEN_CLIP_H, OPEN_CLIP_G)


def test_one_row_for_a_short_caption(tokenizers):
    for tokenizer in tokenizers:
        ((row,), (weights,)) = tokenizer.rows("a cat")
        assert row == [START_ID, 320, CAT, END_ID, *[tokenizer.kind.pad_id] * 73] and weights == [1.0] * 77


@pytest.mark.parametrize("tokens", [75, 150, 225])
def test_the_number_of_rows_does_not_depend_on_the_caption(tokenizers, tokens):
    for text in ("", "a cat", HUNDRED, HUNDRED * 4):
        for tokenizer in tokenizers:
            found = tokenizer.rows(text, tokens=tokens)
            assert [len(row) for row in found.ids] == [77] * (tokens // 75) == [len(row) for row in found.weights]
            assert all(row[0] == START_ID and END_ID in row for row in found.ids)


def test_an_exclamation_mark_is_padding_for_stable_diffusion_2(tokenizers):
    assert [tokenizer.ids("wow !")[-1] for tokenizer in tokenizers] == [256, 0, 256]
    assert tokenizers[1].ids("wow!cat") == [*tokenizers[1].ids("wow"), 0, CAT]


def test_marks_in_a_caption_are_marks(tokenizers):
    assert tokenizers[0].ids("cat<|endoftext|>cat") == [CAT, END_ID, CAT]


@pytest.mark.parametrize(("text", "same"), [
    ("it’s “fine”", "it's \"fine\""),  # noqa: RUF001
    ("A   Cat\n\tsits ", "a cat sits"),
    ("cat &amp; dog", "cat & dog"),
    ("cafÃ©", "café"),
    ("ＣＡＴ", "cat"),  # noqa: RUF001
])  # fmt: skip
def test_texts_are_repaired_first(tokenizers, text, same):
    assert cleaned(text) == same
    assert tokenizers[0].ids(text) == tokenizers[0].ids(same)


def test_plain_captions_do_not_need_ftfy(tokenizers, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert tokenizers[0].ids("A cat's (paw), 100%") == tokenizers[0].ids("a cat's (paw), 100%")
    with pytest.raises(OptionError, match="pip install ftfy"):
        tokenizers[0].ids("café")


def test_brackets_are_characters_unless_they_are_weights(tokenizers):
    plain, weighted = (tokenizers[0].weighted_ids("(cat:1.5) cat", weighted=weighted) for weighted in (False, True))
    assert plain == (tokenizers[0].ids("(cat:1.5) cat"), [1.0] * 8) and len(plain[0]) == 8
    assert weighted == ([CAT, CAT], [1.5, 1.0])


def test_weights_stay_with_their_tokens_in_later_rows(tokenizers):
    found = tokenizers[0].rows(HUNDRED + " (cat:2)", tokens=150, weighted=True)
    ((row, place),) = [(r, p) for r, weights in enumerate(found.weights) for p, weight in enumerate(weights) if weight == 2]
    assert (row, place) == (1, 26) and found.ids[row][place] == CAT


@pytest.mark.parametrize(("words", "rows"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3), (999, 3)])
def test_prompts_take_as_many_rows_as_they_need(tokenizers, words, rows):
    for tokenizer in tokenizers:
        found = tokenizer.prompt_rows(" ".join(["cat"] * words))
        assert len(found.ids) == len(found.weights) == rows
        assert all(row[0] == START_ID and row[-1] == END_ID and len(row) == 77 and 0 not in row for row in found.ids)


def test_count(tokenizers):
    tokenizer = tokenizers[0]
    assert tokenizer.count("a cat") == TokenUse("CLIP-L", 2, 75, None)
    assert tokenizer.count(" ".join(["cat"] * 75)).cut_at is None
    use = tokenizer.count(HUNDRED)
    assert (use.tokens, use.cut_at) == (100, len("cat " * 75))
    assert tokenizer.count(HUNDRED, tokens=150).cut_at is None
    assert tokenizer.count("(cat:1.5) " * 40, weighted=True).tokens == 40
    assert tokenizer.count("").tokens == 0


def test_what_is_said_to_be_seen_is_what_is_seen(tokenizers):
    text = "extraordinarily café “quoted” <3 don't, " * 20  # noqa: RUF001
    cut_at = tokenizers[0].count(text).cut_at
    assert tokenizers[0].ids(text[:cut_at]) == tokenizers[0].ids(text)[: len(tokenizers[0].ids(text[:cut_at]))]
    assert 70 <= len(tokenizers[0].ids(text[:cut_at])) <= 75


def test_loading_is_fast():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        load_tokenizers(CLIP_L)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # measured: below 0.1 s


@pytest.mark.parametrize("module", ["clip_layout", "clip_tokenizer", "prompt_weights"])
def test_needs_no_torch(module):
    code = f"import sys, library.sd.{module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ftfy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
