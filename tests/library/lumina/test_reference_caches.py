"""What Lumina's caches of kohya-ss/sd-scripts mean, against our own encodings."""

from __future__ import annotations

import numpy as np
import pytest

from library.dataset.caches.reference_caches import MisfitError
from library.files.open_weights import open_weights
from library.lumina.reference_caches import LuminaReferenceFormat
from library.lumina.system_prompt import with_system_prompt
from library.lumina.tokenizer import PAD_ID, GemmaTokenizerFile, find_gemma_tokenizer

CAPTION, SYSTEM = "1girl, a cat, in a garden", "You draw."
WIDTH, LENGTH = 8, 64


@pytest.fixture(scope="module")
def tokenizer(tiny_lumina) -> GemmaTokenizerFile:
    return find_gemma_tokenizer(None, open_weights(tiny_lumina["gemma2"], flag="--gemma2"), max_tokens=LENGTH)


@pytest.fixture
def stored(tokenizer):
    """``stored(text, width=...)``: arrays as the reference writes them, padded on the right."""

    def make(text: str, width: int = WIDTH) -> dict[str, np.ndarray]:
        ids = tokenizer.load().ids(text)
        states = np.random.default_rng(0).normal(size=(LENGTH, width)).astype(np.float32)
        mask = (np.arange(LENGTH) < len(ids)).astype(np.int64)
        padded = np.array(ids + [PAD_ID] * (LENGTH - len(ids)))
        return {"hidden_state": states, "attention_mask": mask, "input_ids": padded}

    return make


def test_latents_are_as_ours(tokenizer):
    latents = np.random.default_rng(0).normal(size=(16, 4, 6)).astype(np.float32)
    format = LuminaReferenceFormat(tokenizer, WIDTH, system_prompt="")
    assert np.array_equal(format.scaled_latents(latents), latents)
    assert (format.latents_ending, format.text_ending, format.has_sizes) == ("_lumina.npz", "_lumina_te.npz", True)


@pytest.mark.parametrize("system_prompt", ["", SYSTEM])
@pytest.mark.parametrize("text", [CAPTION, ""])
def test_the_valid_rows_are_taken(tokenizer, stored, system_prompt, text):
    arrays = stored(with_system_prompt(text, system_prompt))
    found = LuminaReferenceFormat(tokenizer, WIDTH, system_prompt=system_prompt).conditioning(arrays, text)
    rows = int(arrays["attention_mask"].sum())
    assert list(found) == ["states"] and np.array_equal(found["states"], arrays["hidden_state"][:rows])


def test_what_does_not_fit(tokenizer, stored):
    format = LuminaReferenceFormat(tokenizer, WIDTH, system_prompt="")
    with pytest.raises(MisfitError, match="another text or system prompt"):
        format.conditioning(stored(with_system_prompt(CAPTION, SYSTEM)), CAPTION)
    with pytest.raises(MisfitError, match="another width"):
        format.conditioning(stored(CAPTION, width=WIDTH * 2), CAPTION)
    with pytest.raises(MisfitError, match="masks"):
        format.conditioning({**stored(CAPTION), "attention_mask": np.ones(7)}, CAPTION)
    with pytest.raises(KeyError):
        format.conditioning({name: a for name, a in stored(CAPTION).items() if name != "input_ids"}, CAPTION)
