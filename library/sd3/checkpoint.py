"""The MMDiT of Stable Diffusion 3: from files to the module, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from library.files.weights_source import Part, module_tensors
from library.nn.loading import Place, load_into
from library.sd3.denoiser import Mmdit
from library.sd3.layout import MmditConfig
from library.sd3.positions import centre_window

POSITIONS = "pos_embed"  # the module's name of its table


def build_denoiser(config: MmditConfig) -> Mmdit:
    """The module on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return Mmdit(config)


def load_denoiser(denoiser: Mmdit, part: Part[MmditConfig], *, device: Place, dtype: torch.dtype) -> None:
    """Streams the weights of ``part`` into a denoiser built from its config, or from ``with_centre_of_positions`` of it: frozen,
    on ``device``, as ``dtype``.

    Peak memory is the model plus one tensor. Raises CheckpointError when a file changed since its header was read.
    """
    tensors = module_tensors(part.source, part.pieces)
    load_into(denoiser, _with_centre(tensors, denoiser.config.position_side), device=device, dtype=dtype)


def _with_centre(tensors: Iterable[tuple[str, Tensor]], side: int) -> Iterator[tuple[str, Tensor]]:
    """Of the position table only the middle, ``side`` patches each way."""
    for name, tensor in tensors:
        yield name, centre_window(tensor[0], side, side) if name == POSITIONS else tensor
