from __future__ import annotations

import pytest
import torch

from library.options.noise import NoiseOptions
from library.training.loss.noise import Draws, model_input_noise, multires_noise, offset_strength, training_noise

LATENTS = torch.randn(4, 8, 24, 16, generator=torch.Generator().manual_seed(1)) + 0.7


def options(**changes) -> NoiseOptions:
    return NoiseOptions(**changes)


def draws(*positions: int, seed: int = 3, step: int = 5) -> Draws:
    return Draws(seed, step, positions or (0, 1, 2, 3))


ALL_NOISE = options(noise_offset=0.1, noise_offset_random_strength=True, multires_noise_iterations=6, adaptive_noise_scale=0.05)


def test_draws_depend_on_seed_step_position_and_purpose_only():
    base = draws().normal("a", 3)
    assert torch.equal(base, draws().normal("a", 3))
    assert torch.equal(base[[2, 0]], draws(2, 0).normal("a", 3))
    others = [
        draws().normal("b", 3),
        draws(seed=4).normal("a", 3),
        draws(step=6).normal("a", 3),
        draws(4, 5, 6, 7).normal("a", 3),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_draws_are_standard():
    normal, uniform = draws().normal("n", 20_000), draws().uniform("u", 20_000)
    assert normal.mean() == pytest.approx(0, abs=0.01)
    assert normal.std() == pytest.approx(1, abs=0.01)
    assert uniform.min() >= 0
    assert uniform.max() <= 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("choice", [options(), ALL_NOISE])
def test_noise_does_not_depend_on_how_the_batch_is_split(choice):
    whole = training_noise(LATENTS, choice, draws())
    parts = [training_noise(LATENTS[i : i + 1], choice, draws(i)) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))


def test_offset_adds_one_number_to_each_channel():
    plain, offset = (training_noise(LATENTS, choice, draws()) for choice in (options(), options(noise_offset=0.5)))
    added = offset - plain
    expected = 0.5 * draws().normal("noise offset", 8, 1, 1)
    assert torch.allclose(added, expected.expand_as(added), atol=1e-6)


def test_offset_random_strength_is_between_zero_and_the_offset():
    strength = offset_strength(LATENTS, options(noise_offset=0.5, noise_offset_random_strength=True), draws())
    assert strength.shape == (4, 1, 1, 1)
    assert strength.min() >= 0
    assert strength.max() <= 0.5
    assert strength.unique().numel() == 4


def test_adaptive_offset_follows_the_channel_mean():
    means = LATENTS.mean(dim=(2, 3), keepdim=True).abs()
    strength = offset_strength(LATENTS, options(noise_offset=0.1, adaptive_noise_scale=0.2), draws())
    assert torch.allclose(strength, 0.1 + 0.2 * means)
    assert not offset_strength(LATENTS, options(noise_offset=0.1, adaptive_noise_scale=-10.0), draws()).any()


def test_multires_noise_is_smoother_and_has_deviation_one():
    noise = draws().normal("noise", 8, 24, 16)
    smooth = multires_noise(noise, options(multires_noise_iterations=6, multires_noise_discount=0.8), draws())
    assert smooth.shape == noise.shape
    assert torch.allclose(smooth.std(dim=(1, 2, 3)), torch.ones(4), atol=1e-5)
    neighbours = [(x[..., 1:] * x[..., :-1]).mean() for x in (noise, smooth)]
    assert neighbours[1] > neighbours[0] + 0.1


def test_multires_of_one_level_is_white_noise():
    """Level 0 has full resolution: the sum of two white noises."""
    one = multires_noise(draws().normal("noise", 8, 24, 16), options(multires_noise_iterations=1), draws())
    assert (one[..., 1:] * one[..., :-1]).mean().abs() < 0.05


def test_multires_stops_at_a_side_of_one():
    few, many = (
        multires_noise(draws().normal("noise", 8, 24, 16), options(multires_noise_iterations=n), draws()) for n in (6, 1000)
    )
    assert torch.equal(few, many)


def test_input_noise():
    noise = draws().normal("noise", 8, 24, 16)
    assert model_input_noise(noise, options(), draws()) is None
    fixed = model_input_noise(noise, options(ip_noise_gamma=0.1), draws()) - noise
    assert fixed.std() == pytest.approx(0.1, rel=0.02)
    random = model_input_noise(noise, options(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True), draws()) - noise
    ratio = (random / fixed).mean(dim=(1, 2, 3))
    assert torch.allclose(ratio, draws().uniform("input noise strength"), atol=1e-3)
