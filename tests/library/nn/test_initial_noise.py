from __future__ import annotations

import torch

from library.nn.initial_noise import initial_noise, initial_noises


def test_noise_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = initial_noise(42, (96, 64))
    torch.manual_seed(2)
    assert torch.equal(first, initial_noise(42, (96, 64))) and not torch.equal(first, initial_noise(43, (96, 64)))
    assert first.shape == (1, 16, 8, 12) and first.dtype == torch.float32


def test_each_row_of_a_batch_has_its_own_seeds_noise():
    noises = initial_noises([5, 6], (32, 48), channels=4)
    assert noises.shape == (2, 4, 6, 4)
    assert torch.equal(noises[1:], initial_noise(6, (32, 48), channels=4))
