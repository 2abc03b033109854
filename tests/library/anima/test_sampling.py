from __future__ import annotations

import pytest
import torch

from library.anima.sampling import flow_sigmas, initial_noise, sample_latents

POSITIVE, NEGATIVE = torch.ones(1, 2, 3), -torch.ones(1, 2, 3)


def sample(predict, noise, **changes):
    settings = {"positive": POSITIVE, "negative": NEGATIVE, "scale": 1.0, "steps": 5, "shift": 3.0, **changes}
    return sample_latents(predict, noise, **settings)


def test_sigmas_go_from_one_to_zero_and_are_shifted():
    assert flow_sigmas(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = flow_sigmas(4, 3.0)
    assert shifted[0] == 1 and shifted[-1] == 0
    torch.testing.assert_close(shifted[2], torch.tensor(3 * 0.5 / (1 + 2 * 0.5)))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_true_velocity_leads_to_the_image(shift):
    image, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(sample(lambda x, s, c: noise - image, noise, shift=shift), image, rtol=1e-4, atol=1e-5)


def test_guidance_pushes_away_from_the_negative():
    seen = []

    def predict(x, sigmas, context):
        seen.append((context is POSITIVE, sigmas.shape))
        return torch.full_like(x, 3.0) if context is POSITIVE else torch.full_like(x, 1.0)

    out = sample(predict, torch.zeros(2, 16, 2, 2), scale=4.0, steps=1)
    torch.testing.assert_close(out, torch.full_like(out, -(1 + 4 * (3 - 1.0))))
    assert seen == [(True, (2,)), (False, (2,))]


@pytest.mark.parametrize("changes", [{"scale": 1.0}, {"scale": 0.5}, {"scale": 7.5, "negative": None}])
def test_without_guidance_the_model_runs_once_per_step(changes):
    contexts = []
    sample(lambda x, s, c: contexts.append(c) or torch.zeros_like(x), torch.zeros(1, 16, 2, 2), **changes)
    assert len(contexts) == 5 and all(context is POSITIVE for context in contexts)


def test_noise_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = initial_noise(42, (96, 64))
    torch.manual_seed(2)
    assert torch.equal(first, initial_noise(42, (96, 64))) and not torch.equal(first, initial_noise(43, (96, 64)))
    assert first.shape == (1, 16, 8, 12) and first.dtype == torch.float32
