"""Tiny Stable Diffusion VAEs in each layout that is in circulation, with random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.files.safetensors_file import save_safetensors
from library.sd.vae_layout import DIFFUSERS, ORIGINAL, VaeConfig, module_shapes, vae_pieces

TINY = VaeConfig(widths=(4, 8, 8, 8), blocks=1, norm_groups=2)
TINY_16 = replace(TINY, latent_channels=16, quant=False)  # in the form of SD3's and FLUX'
HEADER = {"config": json.dumps({"vae": {"norm_groups": TINY.norm_groups}})}


def module_tensors_of(config: VaeConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Under the names of diffusers' module."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in module_shapes(config).items()}


def file_tensors_of(layout: str, *, prefix: str = "", config: VaeConfig = TINY, is_old: bool = False) -> dict[str, Tensor]:
    tensors = module_tensors_of(config)
    pieces = vae_pieces(config, layout, is_old=is_old)
    found = {}
    for name, tensor in tensors.items():
        as_convolution = layout == ORIGINAL and tensor.ndim == 2
        found[prefix + pieces[name].key] = tensor[:, :, None, None] if as_convolution else tensor
    return found


def write_vae(path: Path, layout: str = ORIGINAL, *, prefix: str = "", is_old: bool = False, config: VaeConfig = TINY) -> Path:
    save_safetensors(path, file_tensors_of(layout, prefix=prefix, is_old=is_old, config=config), HEADER)
    return path


def write_vae_folder(folder: Path, *, model: VaeConfig = TINY, **settings: object) -> Path:
    """As diffusers saves it; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKL", "norm_num_groups": TINY.norm_groups, **settings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = folder / "diffusion_pytorch_model.safetensors"
    save_safetensors(path, file_tensors_of(DIFFUSERS, config=model))
    return path
