"""The coder of a file of golden numbers, loaded as a user's file is."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.sd.vae import StableDiffusionVae, load_vae
from library.sd.vae_layout import find_vae, vae_part
from tests.golden.golden_files import Golden


def loaded_vae(
    golden: Golden, folder: Path, *, groups: int, channels: int, scale: float, shift: float = 0.0
) -> StableDiffusionVae:
    """Written to ``folder`` and read again, in fp32."""
    header = {"config": json.dumps({"vae": {"norm_groups": groups}})}
    save_safetensors(folder / "vae.safetensors", golden.weights, header)
    source = open_weights(folder / "vae.safetensors", flag="--vae")
    place = find_vae(source.shapes)
    assert place is not None
    part = vae_part(source, prefix=place.prefix, layout=place.layout, channels=channels)
    return load_vae(part, device="cpu", dtype=torch.float32, scale=scale, shift=shift)
