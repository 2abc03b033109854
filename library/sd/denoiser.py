"""From a checked U-Net in a file to the module: built on the meta device, filled tensor by tensor. See ``library/sd/unet.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library.files.weights_source import Part, module_tensors
from library.nn.loading import Place, load_into
from library.sd.unet_names import UNetConfig

if TYPE_CHECKING:
    from library.sd.unet import StableDiffusionUNet


def build_unet(config: UNetConfig) -> StableDiffusionUNet:
    """The U-Net of these sizes, frozen, on the meta device: names and shapes, no memory. Imports diffusers."""
    from library.sd.unet import StableDiffusionUNet

    with torch.device("meta"):
        return StableDiffusionUNet(config).requires_grad_(False)


def load_unet(unet: StableDiffusionUNet, part: Part[UNetConfig], *, device: Place, dtype: torch.dtype) -> None:
    """Streams the weights of ``part`` into ``unet``, which ``build_unet`` has made for ``part.config``."""
    load_into(unet, module_tensors(part.source, part.pieces), device=device, dtype=dtype)
