"""Cache files as kohya-ss/sd-scripts writes them for Anima: numpy's .npz, values as float32, text padded to 512 tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

ROWS = 512


def write_latents(  # noqa: PLR0913  # what the file says
    image: Path, size_wh: tuple[int, int], latents: np.ndarray, *, flipped: np.ndarray | None = None,
    original_wh: tuple[int, int] | None = None, model: str = "anima",
) -> Path:  # fmt: skip
    """``size_wh``: of the image, for the file's name. ``latents`` [16, h, w], or [16, 1, h, w] as older versions wrote them.
    Those of other flow models lie in files of the same form."""
    path = image.with_name(f"{image.stem}_{size_wh[0]:04d}x{size_wh[1]:04d}_{model}.npz")
    key = f"_{latents.shape[-2]}x{latents.shape[-1]}"
    arrays = dict(np.load(path)) if path.is_file() else {}  # sizes share a file
    arrays |= {
        f"latents{key}": latents.astype(np.float32),
        f"original_size{key}": np.array(original_wh or size_wh),
        f"crop_ltrb{key}": np.array([0, 0, latents.shape[-1] * 8, latents.shape[-2] * 8]),
    }
    if flipped is not None:
        arrays[f"latents_flipped{key}"] = flipped.astype(np.float32)
    np.savez(path, **arrays)
    return path


def write_text(image: Path, prompt_embeds: np.ndarray, t5_ids: np.ndarray) -> Path:
    """``prompt_embeds`` (n, D) and ``t5_ids`` (m,): valid rows."""
    path = image.with_name(f"{image.stem}_anima_te.npz")
    embeds = np.zeros((ROWS, prompt_embeds.shape[1]), np.float32)
    embeds[: len(prompt_embeds)] = prompt_embeds
    ids = np.zeros(ROWS, np.int32)
    ids[: len(t5_ids)] = t5_ids
    np.savez(
        path,
        prompt_embeds=embeds,
        attn_mask=(np.arange(ROWS) < len(prompt_embeds)).astype(np.int64),
        t5_input_ids=ids,
        t5_attn_mask=(np.arange(ROWS) < len(t5_ids)).astype(np.int32),
        caption_dropout_rate=np.float32(0.0),
    )
    return path
