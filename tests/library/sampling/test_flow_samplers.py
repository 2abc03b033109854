"""Samplers against what is known exactly: straight flows, DDIM, and Gaussian data, whose velocity has a formula."""

from __future__ import annotations

import math

import pytest
import torch

from library.sampling.flow_samplers import (
    SAMPLERS,
    SCHEDULES,
    FlowSettings,
    draw_flow,
    er_sde,
    euler,
    flow_sampler_name,
    flow_sigmas,
    slowing_gain,
    step_noise,
)

POSITIVE, NEGATIVE = torch.ones(1, 2, 3), -torch.ones(1, 2, 3)
DEVIATION = 0.5  # of the Gaussian data


def sample(predict, noise, *, positive=POSITIVE, negative=NEGATIVE, seeds=None, **changes):
    settings = FlowSettings(**{"scale": 2.0, "steps": 5, "shift": 3.0, **changes})
    return draw_flow(predict, noise, positive=positive, negative=negative, settings=settings, seeds=seeds or [0] * len(noise))


def no_noise(step):
    raise AssertionError("no noise is drawn")


def steady(lambdas):
    """The gain without new noise."""
    return torch.ones_like(lambdas)


def test_sigmas_go_from_one_to_zero_and_are_shifted():
    assert flow_sigmas(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = flow_sigmas(4, 3.0)
    assert shifted[0] == 1 and shifted[-1] == 0
    torch.testing.assert_close(shifted[2], torch.tensor(3 * 0.5 / (1 + 2 * 0.5)))


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_the_table_schedule_is_that_of_the_scheduler_that_sd3_is_published_with(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(flow_sigmas(steps, shift, schedule="table"), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 5, 36])
def test_the_even_schedule_is_that_of_the_pipeline_of_lumina(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).numpy())  # as Lumina2Pipeline asks for them
    torch.testing.assert_close(flow_sigmas(steps, 6.0), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_true_velocity_leads_to_the_image(sampler, schedule, steps, shift):
    image, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)

    def predict(x, sigmas, context):
        return (x - image) / sigmas.view(-1, 1, 1, 1)

    found = sample(predict, noise, sampler=sampler, schedule=schedule, steps=steps, shift=shift)
    torch.testing.assert_close(found, image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_pushes_away_from_the_negative(sampler):
    seen = []

    def predict(x, sigmas, context):
        seen.append((context is POSITIVE, sigmas.tolist()))
        return torch.full_like(x, 3.0) if context is POSITIVE else torch.full_like(x, 1.0)

    out = sample(predict, torch.zeros(2, 16, 2, 2), scale=4.0, steps=1, sampler=sampler)
    torch.testing.assert_close(out, torch.full_like(out, -(1 + 4 * (3 - 1.0))))
    assert seen == [(True, [1.0, 1.0]), (False, [1.0, 1.0])]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_a_negative_the_model_runs_once_per_step(sampler):
    contexts = []
    noise = torch.zeros(1, 16, 2, 2)
    sample(lambda x, s, c: contexts.append(c) or torch.zeros_like(x), noise, scale=7.5, negative=None, sampler=sampler)
    assert len(contexts) == 5 and all(context is POSITIVE for context in contexts)


@pytest.mark.parametrize(("ratio", "passes"), [(0.0, 0), (0.25, 2), (0.75, 4), (1.0, 5), (2.0, 5), (None, 5)])
def test_guidance_ends_where_it_is_cut_off(ratio, passes):
    """Of five even steps, at 0, 0.2, ... 0.8 of the way; a negative pass that does not count is not computed."""
    negatives = []

    def predict(x, sigmas, context):
        if context is NEGATIVE:
            negatives.append(1 - float(sigmas[0]))
        return torch.full_like(x, 1.0 if context is POSITIVE else 0.0)

    out = sample(predict, torch.zeros(1, 4, 2, 2), shift=1.0, cfg_trunc_ratio=ratio)  # scale 2
    assert len(negatives) == passes and all(time < (ratio or 1) for time in negatives)
    torch.testing.assert_close(out, torch.full_like(out, -(2 * passes + (5 - passes)) / 5))


def test_a_guided_velocity_is_no_longer_than_allowed():
    positive = torch.tensor([3.0, 3.0, 0.0]).view(3, 1, 1, 1).expand(3, 4, 2, 2)
    negative = torch.tensor([1.0, 2.9, 0.0]).view(3, 1, 1, 1).expand(3, 4, 2, 2)

    def velocity(longest):
        return -sample(
            lambda x, s, context: positive if context is POSITIVE else negative,
            torch.zeros(3, 4, 2, 2), steps=1, renorm_cfg=longest,
        ).mean(dim=(1, 2, 3))  # fmt: skip

    torch.testing.assert_close(velocity(0.0), torch.tensor([5.0, 3.1, 0.0]))
    torch.testing.assert_close(velocity(None), velocity(0.0))
    torch.testing.assert_close(velocity(1.0), torch.tensor([3.0, 3.0, 0.0]))  # sample by sample, and never longer than it was
    torch.testing.assert_close(velocity(1.2), torch.tensor([3.6, 3.1, 0.0]))


def test_the_first_known_name_is_the_sampler():
    assert flow_sampler_name("er_sde", "euler") == "er_sde" and flow_sampler_name(None, "er_sde") == "er_sde"
    assert flow_sampler_name("ddim", None) == "euler"


# ---------------------------------------------------------------- noise


def test_noise_is_a_function_of_seed_and_step_in_any_batch():
    like = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16)
    both = step_noise([7, 8], 2, like)
    assert both.shape == like.shape and both.dtype == like.dtype
    torch.manual_seed(0)
    assert torch.equal(both[1:], step_noise([8], 2, like)) and not torch.equal(both[0], both[1])
    assert not torch.equal(both, step_noise([7, 8], 3, like))


def test_rows_of_a_batch_do_not_depend_on_each_other():
    def predict(x, sigmas, context):
        return x * sigmas.view(-1, 1, 1, 1) + context

    noise = torch.randn(3, 4, 2, 2)
    settings = {"sampler": "er_sde", "positive": torch.tensor(0.3), "negative": None}
    together = sample(predict, noise, seeds=[4, 5, 6], **settings)
    alone = sample(predict, noise[1:2], seeds=[5], **settings)
    assert torch.equal(together[1:2], alone)


# ---------------------------------------------------------------- er_sde: known forms


def test_without_new_noise_one_stage_is_euler():
    matrix = torch.randn(6, 6, dtype=torch.float64) / 3
    noise = torch.randn(2, 6, dtype=torch.float64)

    def velocity(x, sigma):
        return torch.tanh(x @ matrix) + sigma

    sigmas = flow_sigmas(9, 2.0).double()
    found = er_sde(velocity, noise, sigmas, no_noise, stages=1, gain=steady)
    torch.testing.assert_close(found, euler(velocity, noise, sigmas, no_noise), rtol=1e-9, atol=1e-10)


def test_the_step_from_pure_noise_is_the_limit_of_steps_near_it():
    """At sigma 1 lambda is infinite; steps from just below it come to the same numbers, as far as they are from it."""
    noise, fresh = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 3, 8, dtype=torch.float64)

    def velocity(x, sigma):
        return torch.sin(x) + sigma

    def end(first):
        sigmas = torch.tensor([first, 0.8, 0.5, 0.2], dtype=torch.float64)
        return er_sde(velocity, noise, sigmas, lambda step: fresh[step])

    limit = end(1.0)
    assert limit.isfinite().all()
    errors = [float((end(1 - gap) - limit).abs().max()) for gap in (1e-4, 1e-6, 1e-8)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6
    image = noise - velocity(noise, 1.0)
    one = er_sde(velocity, noise, torch.tensor([1.0, 0.8], dtype=torch.float64), lambda step: fresh[step])
    torch.testing.assert_close(one, 0.2 * image + 0.8 * fresh[0])


def reference_er_sde(velocity, x, sigmas, noise_of):
    """The paper's formulas as they stand, one after the other, for sigmas below 1: another way to the same numbers."""

    def phi(value):
        return value * (math.exp(value**0.3) + 10)

    lambdas = [s / (1 - s) for s in sigmas]
    images, slopes = [], []
    for i, s in enumerate(sigmas[:-1]):
        t, a, b = sigmas[i + 1], lambdas[i], lambdas[i + 1]
        images.append(x - s * velocity(x, s))
        if t == 0:
            return images[-1]
        r, alpha, alpha_s = phi(b) / phi(a), 1 - t, 1 - s
        x = alpha / alpha_s * r * x + alpha * (1 - r) * images[i]
        points = [b + (a - b) * k / 200 for k in range(200)]
        if i >= 1:
            slopes.append((images[i] - images[i - 1]) / (a - lambdas[i - 1]))
            x = x + alpha * (b - a + phi(b) * sum((a - b) / 200 / phi(p) for p in points)) * slopes[-1]
        if i >= 2:
            bend = (slopes[-1] - slopes[-2]) / ((a - lambdas[i - 2]) / 2)
            x = x + alpha * ((b - a) ** 2 / 2 + phi(b) * sum((p - a) * (a - b) / 200 / phi(p) for p in points)) * bend
        x = x + alpha * math.sqrt(b**2 - a**2 * r**2) * noise_of(i)
    return x


@pytest.mark.parametrize("last", [0.0, 0.1])
def test_numbers_are_those_of_the_papers_formulas(last):
    noise, fresh = torch.randn(2, 5, dtype=torch.float64), torch.randn(6, 2, 5, dtype=torch.float64)
    sigmas = [0.97, 0.9, 0.7, 0.45, 0.3, last]

    def velocity(x, sigma):
        return torch.cos(2 * x) - sigma * x

    found = er_sde(velocity, noise, torch.tensor(sigmas, dtype=torch.float64), lambda step: fresh[step])
    expected = reference_er_sde(velocity, noise, sigmas, lambda step: fresh[step])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_last_step_is_without_noise():
    asked = []

    def noise_of(step):
        asked.append(step)
        return torch.zeros(1, 4)

    er_sde(lambda x, s: x, torch.ones(1, 4), flow_sigmas(5, 1.0), noise_of)
    assert asked == [0, 1, 2, 3]


# ---------------------------------------------------------------- er_sde: Gaussian data


def gaussian_velocity(mean):
    """The exact velocity for data N(mean, DEVIATION^2): from E[image | x] = mean + a d^2 / (a^2 d^2 + s^2) (x - a mean)."""

    def velocity(x, sigma):
        alpha = 1 - sigma
        shrink = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        image = mean + shrink * (x - alpha * mean)
        return (x - image) / sigma

    return velocity


def exact_spread(sigmas, **changes):
    """The variance of what the sampler draws, without drawing: the sampler is linear here, so each of its noises, the first one
    included, gets a coordinate of its own, and the squares of the result's coordinates add up."""
    steps = len(sigmas)
    coordinates = torch.eye(steps, dtype=torch.float64)
    out = er_sde(gaussian_velocity(0.0), coordinates[:1], sigmas, lambda step: coordinates[step + 1][None], **changes)
    return float(out.square().sum())


def even_sigmas(steps, last):
    return torch.linspace(1, last, steps + 1, dtype=torch.float64)


def spread_error(steps, last=0.25, **changes):
    right = (1 - last) ** 2 * DEVIATION**2 + last**2
    return abs(exact_spread(even_sigmas(steps, last), **changes) - right)


@pytest.mark.parametrize("gain", [slowing_gain, steady, lambda lambdas: 1 + lambdas])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_variance_converges_to_that_of_the_data(stages, gain):
    errors = [spread_error(steps, stages=stages, gain=gain) for steps in (10, 20, 40, 80)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0], errors
    whole = [abs(exact_spread(even_sigmas(steps, 0.0), stages=stages, gain=gain) - DEVIATION**2) for steps in (20, 160)]
    assert whole[1] < 0.2 * whole[0] and whole[1] < 0.01, whole


@pytest.mark.parametrize("steps", [20, 40, 80])
def test_more_stages_are_more_exact(steps):
    one, two, three = (spread_error(steps, stages=stages) for stages in (1, 2, 3))
    assert three < two < one / 3, (one, two, three)


def test_the_mean_is_that_of_the_data():
    for steps, limit in ((10, 0.05), (80, 0.005)):
        out = er_sde(gaussian_velocity(2.0), torch.zeros(1, 1, dtype=torch.float64), even_sigmas(steps, 0.0),
                     lambda step: torch.zeros(1, 1, dtype=torch.float64))  # fmt: skip
        assert abs(float(out) - 2.0) < limit


def test_drawn_pictures_have_the_mean_and_the_variance_of_the_data():
    noise = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(3))
    velocity = gaussian_velocity(1.5)
    settings = {"sampler": "er_sde", "steps": 40, "shift": 1.0, "negative": None}
    out = sample(lambda x, sigmas, context: velocity(x, float(sigmas[0])), noise, seeds=[1, 2], **settings)
    assert abs(float(out.mean()) - 1.5) < 0.01 and abs(float(out.std()) - DEVIATION) < 0.01
