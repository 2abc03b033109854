"""What SDXL is told of an image's sizes: micro-conditioning of arXiv 2307.01952, section 2.2."""

from __future__ import annotations

import torch
from torch import Tensor

from library.nn.embeddings import time_sinusoid

WAVES = 256  # numbers for each size: 128 cosines, then 128 sines
SIZES = 6


def size_vector(pooled: Tensor, original_wh: Tensor, crop_left_top: Tensor, target_wh: Tensor) -> Tensor:
    """pooled (B, P) of the text, and (B, 2) pixels each -> (B, P + 6 * 256), typed as ``pooled``, on its device.

    original_wh: of the image file; crop_left_top: where the crop begins in the resized image; target_wh: of the crop. The model
    reads heights before widths: original height and width, top, left, target height and width.
    """
    pairs = [
        pair.to(pooled.device, torch.float32, non_blocking=True).flip(-1) for pair in (original_wh, crop_left_top, target_wh)
    ]
    sizes = torch.cat(pairs, dim=-1)  # (B, 6)
    waves = time_sinusoid(sizes.flatten(), WAVES).view(len(sizes), SIZES * WAVES)
    return torch.cat((pooled, waves.to(pooled.dtype)), dim=-1)
