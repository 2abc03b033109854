"""What the caches that kohya-ss/sd-scripts wrote for Stable Diffusion and SDXL mean. Numpy only."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from library.dataset.caches.reference_caches import Arrays, MisfitError


class SdReferenceFormat:
    """See ``library/dataset/caches/reference_caches.py``. ``name``: "sd" or "sdxl", as in the files' names.

    Latents are kept raw; ``scale`` is what they are multiplied by here. Text is never taken over: Stable Diffusion has no such
    files, and SDXL's do not say which text they are of; where the model was a single file, their pooled vectors were made with
    the projection of the second text encoder the wrong way round.
    """

    has_sizes = False

    def __init__(self, name: str, scale: float):
        self.latents_ending = f"_{name}.npz"
        self.text_ending = "_te_outputs.npz"
        self._scale = scale

    def scaled_latents(self, stored: np.ndarray) -> np.ndarray:
        """[4, h, w] float32, a sample of the posterior as the VAE gave it."""
        return stored * np.float32(self._scale)

    def conditioning(self, arrays: Arrays, text: str) -> NoReturn:
        raise MisfitError(
            "that may be of another text, and with pooled vectors that kohya-ss/sd-scripts makes with a transposed projection"
        )
