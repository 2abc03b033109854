"""What the caches that kohya-ss/sd-scripts wrote for Anima mean. Numpy only."""

from __future__ import annotations

from functools import cached_property
from threading import Lock

import numpy as np

from library.anima.tokenizers import AnimaTokenizers, TokenizerFiles
from library.dataset.caches.reference_caches import Arrays, MisfitError


class AnimaReferenceFormat:
    """See ``library/dataset/caches/reference_caches.py``. ``width``: of the text encoder's states."""

    latents_ending = "_anima.npz"
    text_ending = "_anima_te.npz"
    has_sizes = True

    def __init__(self, tokenizer_files: TokenizerFiles | None, width: int | None):
        self._files, self._width = tokenizer_files, width
        self._loading = Lock()  # files are read in threads

    @cached_property
    def _tokenizers(self) -> AnimaTokenizers:
        return (self._files or TokenizerFiles()).load()

    def scaled_latents(self, stored: np.ndarray) -> np.ndarray:
        """[16, h, w], in old files [16, 1, h, w], float32: already shifted and scaled for each channel, as ours are."""
        return stored[:, 0] if stored.ndim == 4 and stored.shape[1] == 1 else stored

    def conditioning(self, arrays: Arrays, text: str) -> dict[str, np.ndarray]:
        """prompt_embeds [512, D] float32 with attn_mask [512], t5_input_ids [512] with t5_attn_mask [512] -> their valid rows."""
        with self._loading:
            wanted = self._tokenizers.ids(text)
        t5_ids = _valid(arrays["t5_input_ids"], arrays["t5_attn_mask"])
        if t5_ids.ndim != 1 or t5_ids.tolist() != wanted.t5:
            raise MisfitError("made from another text than is trained, or cut at another length")
        embeds = _valid(arrays["prompt_embeds"], arrays["attn_mask"])
        if embeds.ndim != 2 or len(embeds) != len(wanted.qwen):
            raise MisfitError("with another number of Qwen3 tokens than the text that is trained")
        if self._width is not None and embeds.shape[1] != self._width:
            raise MisfitError("with states of another width than the text encoder's")
        return {"prompt_embeds": embeds, "t5_ids": t5_ids.astype(np.int32)}


def _valid(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The rows whose mask is not 0."""
    if mask.ndim != 1 or rows.shape[:1] != mask.shape:
        raise MisfitError("with masks that do not fit their arrays")
    return rows[mask != 0]
