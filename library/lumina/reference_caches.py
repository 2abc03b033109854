"""What the caches that kohya-ss/sd-scripts wrote for Lumina Image 2.0 mean. Numpy only."""

from __future__ import annotations

from functools import cached_property
from threading import Lock

import numpy as np

from library.dataset.caches.reference_caches import Arrays, MisfitError
from library.lumina.system_prompt import with_system_prompt
from library.lumina.tokenizer import GemmaTokenizer, GemmaTokenizerFile


class LuminaReferenceFormat:
    """See ``library/dataset/caches/reference_caches.py``. ``width``: of the text encoder's states."""

    latents_ending = "_lumina.npz"
    text_ending = "_lumina_te.npz"
    has_sizes = True

    def __init__(self, tokenizer: GemmaTokenizerFile | None, width: int | None, *, system_prompt: str):
        self._file, self._width, self._system_prompt = tokenizer, width, system_prompt
        self._loading = Lock()  # files are read in threads

    @cached_property
    def _tokenizer(self) -> GemmaTokenizer:
        assert self._file is not None  # text is asked for where the text encoder's files were read
        return self._file.load()

    def scaled_latents(self, stored: np.ndarray) -> np.ndarray:
        """[16, h, w] float32: already shifted and scaled, as ours are."""
        return stored

    def conditioning(self, arrays: Arrays, text: str) -> dict[str, np.ndarray]:
        """hidden_state [T, C] float32, input_ids and attention_mask [T] -> the valid rows."""
        with self._loading:
            wanted = self._tokenizer.ids(with_system_prompt(text, self._system_prompt))
        mask, ids, states = arrays["attention_mask"], arrays["input_ids"], arrays["hidden_state"]
        if mask.ndim != 1 or ids.shape != mask.shape or states.ndim != 2 or len(states) != len(mask):
            raise MisfitError("with masks that do not fit their arrays")
        if ids[mask != 0].tolist() != wanted:
            raise MisfitError("made from another text or system prompt than is trained, or cut at another length")
        if self._width is not None and states.shape[1] != self._width:
            raise MisfitError("with states of another width than the text encoder's")
        return {"states": states[mask != 0]}
