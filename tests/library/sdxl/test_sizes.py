from __future__ import annotations

import math

import torch

from library.sdxl.sizes import size_vector

PAIRS = torch.tensor([[640, 480], [1024, 768]]), torch.tensor([[3, 5], [0, 16]]), torch.tensor([[512, 384], [896, 640]])


def test_each_size_becomes_waves_heights_before_widths():
    vector = size_vector(torch.zeros(2, 4), *PAIRS)
    assert vector.shape == (2, 4 + 6 * 256)
    sizes = [[480, 640, 5, 3, 384, 512], [768, 1024, 16, 0, 640, 896]]
    for row, numbers in zip(vector[:, 4:].view(2, 6, 256), sizes, strict=True):
        for waves, number in zip(row, numbers, strict=True):
            angles = [number * 10000 ** (-k / 128) for k in (0, 1, 64, 127)]
            found = [float(waves[k]) for k in (0, 1, 64, 127)] + [float(waves[128 + k]) for k in (0, 1, 64, 127)]
            expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
            assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=2e-4)  # angles of a thousand, in float32


def test_the_pooled_text_comes_first_and_gives_the_number_format():
    pooled = torch.randn(2, 4).bfloat16()
    vector = size_vector(pooled, *PAIRS)
    assert vector.dtype == torch.bfloat16 and torch.equal(vector[:, :4], pooled)
    assert torch.equal(vector[:, 4:], size_vector(torch.zeros(2, 4), *(pair.float() for pair in PAIRS))[:, 4:].bfloat16())
