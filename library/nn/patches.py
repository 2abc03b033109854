"""Pictures as rows of patches and back; inside a patch the order is row, column, channel.

B batch · c channels · N = h / patch * w / patch patches, row by row
"""

from __future__ import annotations

import torch
from torch import Tensor


def patch_rows(x: Tensor, patch: int) -> Tensor:
    """x (B, c, h, w), both sides whole patches -> (B, N, patch * patch * c)"""
    batch, channels, height, width = x.shape
    grid = x.view(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, shape: torch.Size, patch: int) -> Tensor:
    """patches (B, N, patch * patch * c) -> (B, c, h, w) = ``shape``"""
    batch, channels, height, width = shape
    grid = patches.view(batch, height // patch, width // patch, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)
