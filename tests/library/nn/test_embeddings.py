from __future__ import annotations

import math

import torch

from library.nn.embeddings import time_sinusoid


def test_cosines_first_then_sines():
    waves = time_sinusoid(torch.tensor([0.0, 0.5]), 8)
    assert waves.shape == (2, 8) and waves.dtype == torch.float32
    assert waves[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    for i in range(4):
        angle = 0.5 * 10000 ** (-i / 4)
        torch.testing.assert_close(waves[1, [i, i + 4]], torch.tensor([math.cos(angle), math.sin(angle)]))


def test_low_precision_times_are_widened():
    assert time_sinusoid(torch.tensor([0.25], dtype=torch.bfloat16), 8).dtype == torch.float32
