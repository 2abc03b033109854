"""Embeddings of the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PERIOD = 10000.0  # arXiv 1706.03762, section 3.5


def time_sinusoid(times: Tensor, width: int) -> Tensor:
    """times (B,) -> (B, width) in fp32: a block of cosines, then a block of sines, from period 2 pi to 2 pi * 10000."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=times.device, dtype=torch.float32) * (-math.log(MAX_PERIOD) / half))
    angles = times.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
