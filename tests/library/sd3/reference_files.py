"""Cache files as kohya-ss/sd-scripts writes them for SD3: numpy's .npz, values as float32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from library.sd3.tokenizers import load_sd3_tokenizers

CLIP_ROWS = 77

loaded = cache(lambda t5_tokens: load_sd3_tokenizers(t5_tokens=t5_tokens))  # which takes a while


def write_text(  # noqa: PLR0913  # what the file says
    image: Path, text: str, *, widths: tuple[int, int], t5_width: int, t5_tokens: int = 256, has_t5: bool = True,
    masks: tuple[bool, bool] = (False, False),
) -> Path:  # fmt: skip
    """Random numbers for ``text``, in arrays of the right shapes and masks."""
    random = np.random.default_rng(0)
    t5_out = random.normal(size=(t5_tokens, t5_width)).astype(np.float32)
    states = {
        "lg_out": random.normal(size=(CLIP_ROWS, sum(widths))).astype(np.float32),
        "lg_pooled": random.normal(size=sum(widths)).astype(np.float32),
        "t5_out": t5_out if has_t5 else np.zeros((CLIP_ROWS, t5_width), np.float32),
    }
    return save_text(image, text, states, t5_tokens=t5_tokens, masks=masks)


def save_text(
    image: Path, text: str, states: Mapping[str, np.ndarray], *, t5_tokens: int = 256, masks: tuple[bool, bool] = (False, False)
) -> Path:
    """``states``: lg_out, lg_pooled and t5_out of ``text``; the file says besides how many tokens each encoder was given."""
    path = image.with_name(f"{image.stem}_sd3_te.npz")
    tokenizers = loaded(t5_tokens)
    clip = min(len(tokenizers.clip_l.ids(text)), CLIP_ROWS - 2) + 2
    clip_mask = (np.arange(CLIP_ROWS) < clip).astype(np.int64)
    np.savez(
        path,
        **states,
        clip_l_attn_mask=clip_mask,
        clip_g_attn_mask=clip_mask,
        t5_attn_mask=(np.arange(t5_tokens) < tokenizers.t5.row(text).used).astype(np.int64),
        apply_lg_attn_mask=masks[0],
        apply_t5_attn_mask=masks[1],
    )
    return path
