"""What Anima's caches of kohya-ss/sd-scripts mean, against our own encodings."""

from __future__ import annotations

import numpy as np
import pytest

from library.anima.reference_caches import AnimaReferenceFormat
from library.anima.tokenizers import TokenizerFiles
from library.dataset.caches.reference_caches import MisfitError
from tests.library.anima.reference_files import write_text

CAPTION = "1girl, a cat, in a garden"
WIDTH = 8


@pytest.fixture(scope="module")
def format() -> AnimaReferenceFormat:
    return AnimaReferenceFormat(TokenizerFiles(), WIDTH)


@pytest.fixture(scope="module")
def ids():
    return TokenizerFiles().load().ids(CAPTION)


@pytest.fixture
def stored(tmp_path, ids):
    """``stored(rows=..., t5=...)``: a file as the reference writes it for CAPTION, but for what is given."""

    def make(rows: int | None = None, t5: list[int] | None = None, width: int = WIDTH, **arrays):
        embeds = np.random.default_rng(0).normal(size=(len(ids.qwen) if rows is None else rows, width)).astype(np.float32)
        path = write_text(tmp_path / "a.png", embeds, np.array(ids.t5 if t5 is None else t5))
        return embeds, {**np.load(path), **arrays}

    return make


def test_latents_of_both_ages(format):
    latents = np.random.default_rng(0).normal(size=(16, 4, 6)).astype(np.float32)
    assert np.array_equal(format.scaled_latents(latents), latents)
    assert np.array_equal(format.scaled_latents(latents[:, None]), latents)


def test_the_valid_rows_are_taken(format, stored, ids):
    embeds, arrays = stored()
    found = format.conditioning(arrays, CAPTION)
    assert found.keys() == {"prompt_embeds", "t5_ids"}
    assert np.array_equal(found["prompt_embeds"], embeds)
    assert found["t5_ids"].tolist() == ids.t5 and found["t5_ids"].dtype == np.int32


def test_an_empty_caption_has_no_rows(format, stored):
    _, arrays = stored(rows=0, t5=[1])
    found = format.conditioning(arrays, "")
    assert found["prompt_embeds"].shape == (0, WIDTH) and found["t5_ids"].tolist() == [1]


def test_what_was_made_from_another_text(format, stored, ids):
    with pytest.raises(MisfitError, match="another text"):
        format.conditioning(stored()[1], f"my prefix, {CAPTION}")
    with pytest.raises(MisfitError, match="Qwen3 tokens"):
        format.conditioning(stored(rows=len(ids.qwen) - 1)[1], CAPTION)
    short = AnimaReferenceFormat(TokenizerFiles(qwen_max=2, t5_max=512), WIDTH)
    with pytest.raises(MisfitError, match="Qwen3 tokens"):
        short.conditioning(stored()[1], CAPTION)
    with pytest.raises(MisfitError, match="another text .*cut at another length"):
        AnimaReferenceFormat(TokenizerFiles(t5_max=4), WIDTH).conditioning(stored()[1], CAPTION)


def test_what_was_made_with_another_encoder_or_is_damaged(format, stored):
    with pytest.raises(MisfitError, match="another width"):
        format.conditioning(stored(width=WIDTH * 2)[1], CAPTION)
    with pytest.raises(MisfitError, match="masks"):
        format.conditioning(stored(attn_mask=np.ones(7))[1], CAPTION)
    with pytest.raises(MisfitError, match="another text"):
        format.conditioning(stored(t5_input_ids=np.zeros((512, 2), np.int32))[1], CAPTION)
    with pytest.raises(MisfitError, match="masks"):
        format.conditioning(stored(t5_input_ids=np.array(3))[1], CAPTION)
    _, arrays = stored()
    with pytest.raises(KeyError):
        format.conditioning({name: array for name, array in arrays.items() if name != "attn_mask"}, CAPTION)
