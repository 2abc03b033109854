"""Encoding one image: this project's one-frame VAE against diffusers' video VAE with the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.anima.vae import QwenImageVae, single_frame_weights
from library.anima.vae_layout import layout_of_shapes
from library.nn.loading import load_into
from tools.bench_parts.figures import Figure, alternate, stopwatch

TIMES_FASTER = 4.0  # target
PUBLISHED_WIDTH = 96  # channels of the first stage
LARGEST_DIFFERENCE = 1e-4  # between two float32 results whose sums run in different orders


def measure(repeats: int, *, width: int = PUBLISHED_WIDTH, side: int = 384) -> list[Figure]:
    """Random weights in float32 on the CPU, one image of ``side`` x ``side`` pixels."""
    torch.manual_seed(0)
    theirs = diffusers_vae(width)
    ours = same_vae(theirs)
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    difference = (ours.encode(pixels) - encoded_by(theirs, pixels, ours)).abs().max().item()
    diffusers, project = stopwatch(lambda: encoded_by(theirs, pixels, ours)), stopwatch(lambda: ours.encode(pixels))
    pairs = alternate(diffusers, project, repeats=(repeats + 1) // 2, warm_up=False)  # diffusers takes its time
    how = pairs.described("diffusers", "ours")
    return [
        Figure(name=f"vae: encode {side}x{side}, diffusers / ours", value=pairs.ratio, unit="x", at_least=TIMES_FASTER, how=how),
        Figure(
            name="vae: largest difference", value=difference, unit="", at_most=LARGEST_DIFFERENCE, how="of the scaled latents"
        ),
    ]


def diffusers_vae(width: int) -> Any:
    from diffusers import AutoencoderKLQwenImage

    vae: Any = AutoencoderKLQwenImage(base_dim=width)
    vae.eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith(".gamma"):  # new ones are all 1, which would hide a mistake
            parameter.uniform_(0.5, 1.5)
    return vae


def same_vae(theirs: Any) -> QwenImageVae:
    """Ours with the weights of theirs, through the names of the diffusers layout."""
    tensors = theirs.state_dict()
    with tempfile.TemporaryDirectory() as folder:  # empty: no config.json beside this "file"
        layout = layout_of_shapes(Path(folder) / "diffusers", {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with torch.device("meta"):
        vae = QwenImageVae(layout.known_config)
    load_into(vae, single_frame_weights(tensors.items(), layout.names), device="cpu", dtype=torch.float32)
    return vae.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stubs lack it


@torch.no_grad()
def encoded_by(theirs: Any, pixels: Tensor, ours: QwenImageVae) -> Tensor:
    """Scaled latents of the posterior's mean, by diffusers: (1, 3, H, W) -> (1, 16, h, w)"""
    mean = theirs.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
    return (mean - ours.latents_mean) / ours.latents_std
