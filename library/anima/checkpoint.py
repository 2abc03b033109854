"""Anima's DiT and adapter: from files to the module, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import DenoiserConfig, DenoiserLayout
from library.files.safetensors_file import read_tensors
from library.nn.loading import Place, load_into


def build_denoiser(config: DenoiserConfig) -> AnimaDenoiser:
    """The module on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return AnimaDenoiser(config)


def load_denoiser(denoiser: AnimaDenoiser, layout: DenoiserLayout, *, device: Place, dtype: torch.dtype) -> None:
    """Streams the weights of ``layout`` into a denoiser built from its config: frozen, on ``device``, as ``dtype``.

    Peak memory is the model plus one tensor. Raises CheckpointError when a file changed since its header was read.
    """
    load_into(denoiser, denoiser_tensors(layout), device=device, dtype=dtype)


def denoiser_tensors(layout: DenoiserLayout) -> Iterator[tuple[str, Tensor]]:
    for source in layout.sources:
        for key, tensor in read_tensors(source.header, source.names):
            yield source.names[key], tensor
