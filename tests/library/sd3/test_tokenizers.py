from __future__ import annotations

import pytest

from library.sd3.tokenizers import Sd3Tokenizers, load_sd3_tokenizers

LONG = " ".join(["a red cat"] * 40)


@pytest.fixture(scope="module")
def tokenizers() -> Sd3Tokenizers:
    return load_sd3_tokenizers()


def test_rows_have_one_length(tokenizers):
    assert tokenizers.t5.row("a cat") == ([3, 9, 1712, 1, *[0] * 252], 4)
    assert tokenizers.t5.row("") == ([1, *[0] * 255], 1)
    for tokenizer, pad in ((tokenizers.clip_l, 49407), (tokenizers.clip_g, 0)):
        assert tokenizer.rows("a cat").ids == [[49406, 320, 2368, 49407, *[pad] * 73]]


def test_a_long_caption_keeps_its_end_mark():
    short, long = (load_sd3_tokenizers(t5_tokens=tokens).t5 for tokens in (16, 512))
    row = short.row(LONG)
    assert (len(row.ids), row.used, row.ids[-1]) == (16, 16, 1) and row.ids[:15] == long.row(LONG).ids[:15]


def test_what_each_encoder_takes_in(tokenizers):
    l, g, t5 = tokenizers.counts(LONG)  # noqa: E741
    assert [(use.encoder, use.tokens, use.limit) for use in (l, g, t5)] == [
        ("CLIP-L", 120, 75), ("OpenCLIP-G", 120, 75), ("T5", 161, 256)
    ]  # fmt: skip
    assert l.cut_at == g.cut_at == len("a red cat " * 25) and t5.cut_at is None
    assert tokenizers.lengths(LONG) == [(120, 75), (161, 256)]
    assert load_sd3_tokenizers(t5_tokens=32).counts(LONG)[2].cut_at < l.cut_at


def test_without_t5():
    tokenizers = load_sd3_tokenizers(t5_tokens=None)
    assert tokenizers.t5 is None and len(tokenizers.counts("a cat")) == 2 and tokenizers.lengths("a cat") == [(2, 75)]
