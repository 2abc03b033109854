"""What --base_weights change besides the denoiser: the text encoder, and with it what cached texts depend on.

Needs torch only for files that are pickles.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.files.safetensors_file import file_fingerprint, read_header

if TYPE_CHECKING:
    from library.dataset.caches.text_cache import TextRecipe
    from library.options.network import NetworkOptions

# at the start of a name: of trainers, ComfyUI, diffusers
TEXT_ENCODER_KEY = re.compile(r"lora_te\d*_|lycoris_te\d*_|text_encoder")


def text_base_weights(options: NetworkOptions) -> list[tuple[str, float]]:
    """(file, strength) of those of --base_weights that change a text encoder. Raises CheckpointError for a damaged file."""
    return [(file, strength) for file, strength in options.weights_to_merge if changes_text_encoder(Path(file))]


def changes_text_encoder(file: Path) -> bool:
    return any(TEXT_ENCODER_KEY.match(key) for key in tensor_names(file))


def changes_denoiser(file: Path) -> bool:
    """Whether it has more than a text encoder's part; a file without any names counts too, so that it is told what it lacks."""
    names = tensor_names(file)
    return not names or any(not TEXT_ENCODER_KEY.match(key) for key in names)


def tensor_names(file: Path) -> Collection[str]:
    """None of a pickle that cannot be read: whoever merges it says why."""
    if file.suffix == ".safetensors":
        return read_header(file).tensors
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return ()
    return content if isinstance(content, dict) else ()


def with_base_weights(recipe: TextRecipe, options: NetworkOptions) -> TextRecipe:
    """The recipe of texts encoded after merging. Without such files it is the same."""
    merged = [f"{file_fingerprint(Path(file))} x {strength:g}" for file, strength in text_base_weights(options)]
    return replace(recipe, settings={**recipe.settings, "base_weights": merged}) if merged else recipe
