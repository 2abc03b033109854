"""What the caches that kohya-ss/sd-scripts wrote for SD3 mean. Numpy only."""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np

from library.dataset.caches.reference_caches import Arrays, MisfitError
from library.sd.clip_tokenizer import PIECE, ROW
from library.sd3.layout import Sd3TextParts
from library.sd3.tokenizers import Sd3Tokenizers, load_sd3_tokenizers

CLIP_WIDTHS = (768, 1280)  # of CLIP-L and CLIP-G, as published


class Sd3ReferenceFormat:
    """See ``library/dataset/caches/reference_caches.py``. Latents are kept raw: ours are (raw - ``shift``) * ``scale``.

    ``text``: the encoders of this run (None: not known, all as published); ``t5_tokens``: of a caption; ``masks``: whether the
    padding is hidden from the CLIPs, and from T5. A file does not hold its text, only how many tokens each encoder was given.
    """

    latents_ending = "_sd3.npz"
    text_ending = "_sd3_te.npz"
    has_sizes = True

    def __init__(self, text: Sd3TextParts | None, *, scale: float, shift: float, t5_tokens: int, masks: tuple[bool, bool]):
        self._scale, self._shift = scale, shift
        self._t5_tokens, self._masks = t5_tokens, masks
        self._widths, self._pooled, self._t5_width = CLIP_WIDTHS, CLIP_WIDTHS, None
        if text is not None:
            clips: tuple[Any, Any] = (text.clip_l.config, text.clip_g.config)
            self._widths = (clips[0].width, clips[1].width)
            self._pooled = (clips[0].projection or clips[0].width, clips[1].projection or clips[1].width)
            self._t5_width = None if text.t5 is None else text.t5.config.width
        self._has_t5 = text is None or text.t5 is not None
        self._loading = Lock()  # files are read in threads

    @cached_property
    def _tokenizers(self) -> Sd3Tokenizers:
        return load_sd3_tokenizers(t5_tokens=self._t5_tokens)

    def scaled_latents(self, stored: np.ndarray) -> np.ndarray:
        """[16, h, w] float32, a sample of the posterior as the VAE gave it."""
        return (stored - np.float32(self._shift)) * np.float32(self._scale)

    def conditioning(self, arrays: Arrays, text: str) -> dict[str, np.ndarray]:
        """lg_out [77, L + G], lg_pooled [L + G], t5_out [T, D], with the masks of the tokens and two flags."""
        flags = (arrays["apply_lg_attn_mask"], arrays["apply_t5_attn_mask"])
        if tuple(bool(np.all(flag)) for flag in flags) != self._masks:
            raise MisfitError("made with other settings of --apply_lg_attn_mask or --apply_t5_attn_mask")
        self._check_tokens(arrays, text)
        clip, pooled, t5 = (np.asarray(arrays[name]) for name in ("lg_out", "lg_pooled", "t5_out"))
        if clip.shape != (ROW, sum(self._widths)) or pooled.shape != (sum(self._pooled),):
            raise MisfitError("with CLIP states of another width than the text encoders'")
        l_states, g_states = np.split(clip, [self._widths[0]], axis=1)
        l_pooled, g_pooled = np.split(pooled, [self._pooled[0]])
        t5_states = self._t5_states(t5)
        return {
            "l_states": l_states, "g_states": g_states, "t5_states": t5_states, "l_pooled": l_pooled, "g_pooled": g_pooled
        }  # fmt: skip

    def _check_tokens(self, arrays: Arrays, text: str) -> None:
        """Raises MisfitError where a mask has another number of tokens than the text; T5's only where there is one."""
        with self._loading:
            tokenizers = self._tokenizers
        assert tokenizers.t5 is not None
        clip = min(len(tokenizers.clip_l.ids(text)), PIECE) + 2
        wanted = {"clip_l_attn_mask": clip, "clip_g_attn_mask": clip}
        if self._has_t5:
            wanted["t5_attn_mask"] = tokenizers.t5.row(text).used
        for name, tokens in wanted.items():
            if int((np.asarray(arrays[name]) != 0).sum()) != tokens:
                raise MisfitError("made from another text than is trained, or cut at another length")

    def _t5_states(self, stored: np.ndarray) -> np.ndarray:
        """[T, D]; [0, L + G] for a run without T5, for which the file has zeros."""
        if not self._has_t5:
            if stored.any():
                raise MisfitError("made with a T5, which this run does not have")
            return np.zeros((0, sum(self._widths)), stored.dtype)
        if not stored.any():
            raise MisfitError("made without a T5, which this run has")
        if stored.ndim != 2 or len(stored) != self._t5_tokens:
            raise MisfitError("made from another text than is trained, or cut at another length")
        if self._t5_width is not None and stored.shape[1] != self._t5_width:
            raise MisfitError("with T5 states of another width than the text encoder's")
        return stored
