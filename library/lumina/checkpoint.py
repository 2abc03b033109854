"""Lumina Image 2.0's denoiser: from files to the module, tensor by tensor."""

from __future__ import annotations

import torch

from library.files.weights_source import Part, module_tensors
from library.lumina.denoiser import NextDit
from library.lumina.layout import NextDitConfig
from library.nn.loading import Place, load_into


def build_denoiser(config: NextDitConfig) -> NextDit:
    """The module on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return NextDit(config)


def load_denoiser(denoiser: NextDit, part: Part[NextDitConfig], *, device: Place, dtype: torch.dtype) -> None:
    """Streams the weights of ``part`` into a denoiser built from its config: frozen, on ``device``, as ``dtype``.

    Peak memory is the model plus one tensor. Raises CheckpointError when a file changed since its header was read.
    """
    load_into(denoiser, module_tensors(part.source, part.pieces), device=device, dtype=dtype)
