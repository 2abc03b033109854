"""What SD3's caches of kohya-ss/sd-scripts mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.dataset.caches.reference_caches import MisfitError
from library.sd3.architecture import SD3
from library.sd3.layout import Sd3Layouts
from library.sd3.text import Sd3Conditioning
from tests.library.sd3.reference_files import write_text
from tests.library.sd3.test_architecture import options_for

CAPTION = "1girl, a cat, in a garden"
SIZES = {"widths": (16, 24), "t5_width": 48}  # of the tiny encoders


@pytest.fixture
def stored(tmp_path):
    """``stored(text=CAPTION, masks=...)``: the arrays of a file as the reference writes it."""
    return lambda text=CAPTION, **changes: dict(np.load(write_text(tmp_path / "a.png", text, **{**SIZES, **changes})))


def format_of(model, **sd3):
    options = options_for(model, sd3=sd3)
    return SD3.reference_format(SD3.read_layouts(options, {"text", "vae"}), options)


def test_raw_latents_are_shifted_and_scaled(tiny_sd3):
    raw = np.random.default_rng(0).normal(size=(16, 4, 6)).astype(np.float32)
    found = format_of(tiny_sd3["sd3_whole"]).scaled_latents(raw)
    assert np.allclose(found, (raw - 0.0609) * 1.5305, rtol=1e-6) and found.dtype == np.float32
    nothing_read = SD3.reference_format(Sd3Layouts(), options_for())
    assert np.array_equal(nothing_read.scaled_latents(raw), found)
    assert (nothing_read.latents_ending, nothing_read.text_ending) == ("_sd3.npz", "_sd3_te.npz")


def test_text_is_cut_into_its_encoders(stored, tiny_sd3):
    arrays = stored()
    found = format_of(tiny_sd3["sd3_whole"]).conditioning(arrays, CAPTION)
    text = Sd3Conditioning.from_cache({name: torch.from_numpy(array)[None] for name, array in found.items()}, {})
    assert np.array_equal(text.pooled[0], arrays["lg_pooled"])
    context = text.context(48)[0]
    assert np.array_equal(context[:77, :40], arrays["lg_out"]) and not context[:77, 40:].any()
    assert np.array_equal(context[77:], arrays["t5_out"])


def test_text_without_t5(stored, tiny_sd3):
    arrays = stored(has_t5=False)
    found = format_of(tiny_sd3["sd3_clips"]).conditioning(arrays, CAPTION)
    assert found["t5_states"].shape == (0, 40) and found["g_states"].shape == (77, 24)
    with pytest.raises(MisfitError, match="without a T5, which this run has"):
        format_of(tiny_sd3["sd3_whole"]).conditioning(arrays, CAPTION)
    with pytest.raises(MisfitError, match="with a T5, which this run does not have"):
        format_of(tiny_sd3["sd3_clips"]).conditioning(stored(), CAPTION)


@pytest.mark.parametrize("masks", [(True, False), (False, True)])
def test_the_settings_of_masks_must_agree(masks, stored, tiny_sd3):
    given = {"apply_lg_attn_mask": masks[0], "apply_t5_attn_mask": masks[1]}
    with pytest.raises(MisfitError, match="other settings of --apply_lg_attn_mask"):
        format_of(tiny_sd3["sd3_whole"]).conditioning(stored(masks=masks), CAPTION)
    assert format_of(tiny_sd3["sd3_whole"], **given).conditioning(stored(masks=masks), CAPTION)


def test_what_was_made_from_another_text_or_at_another_length(stored, tiny_sd3):
    with pytest.raises(MisfitError, match="another text"):
        format_of(tiny_sd3["sd3_whole"]).conditioning(stored(), f"my prefix, {CAPTION}")
    with pytest.raises(MisfitError, match="cut at another length"):
        format_of(tiny_sd3["sd3_whole"], t5xxl_max_token_length=77).conditioning(stored(), CAPTION)
    long = "dog " * 200
    format_of(tiny_sd3["sd3_whole"], t5xxl_max_token_length=77).conditioning(stored(long, t5_tokens=77), long)


def test_what_was_made_with_other_encoders_or_is_damaged(stored, tiny_sd3):
    with pytest.raises(MisfitError, match="CLIP states of another width"):
        format_of(tiny_sd3["sd3_whole"]).conditioning(stored(widths=(16, 32)), CAPTION)
    with pytest.raises(MisfitError, match="T5 states of another width"):
        format_of(tiny_sd3["sd3_whole"]).conditioning(stored(t5_width=40), CAPTION)
    with pytest.raises(KeyError):
        format_of(tiny_sd3["sd3_whole"]).conditioning({k: v for k, v in stored().items() if k != "lg_pooled"}, CAPTION)
