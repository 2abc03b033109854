from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from library.nn.initial_noise import initial_noises
from library.options.samples import SAMPLERS as SAMPLER_NAMES
from library.sampling.picture_plan import Picture
from library.sd.layout import EPSILON, VELOCITY
from library.sd.linear_multistep import LinearMultistep, weight
from library.sd.sampling import SAMPLERS, TextInputs, build_scheduler, draw, draw_latents, guided, passes

PICTURE = Picture(prompt="a", negative_prompt="b", width=64, height=32, seed=7, steps=3, scale=4.0, sampler="euler")


class Unet:
    """Predicts something that depends on every input, and counts its calls."""

    def __init__(self):
        self.rows: list[int] = []

    def predict(self, latents, timesteps, context, vector):
        assert timesteps.shape == (len(latents),) and len(context) == len(latents)
        self.rows.append(len(latents))
        told = context.mean(dim=(1, 2)) + (0 if vector is None else vector.mean(dim=1))
        return latents.tanh() * (1 + timesteps / 1000)[:, None, None, None] + told[:, None, None, None]


def text(value: float) -> TextInputs:
    return TextInputs(torch.full((1, 5, 2), float(value)))


def test_every_name_of_the_option_has_a_sampler():
    assert set(SAMPLERS) == set(SAMPLER_NAMES)


@pytest.mark.parametrize("prediction", [EPSILON, VELOCITY])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("k_")])  # which are the same: see below
def test_every_sampler_draws_with_any_number_of_steps(name, prediction):
    for steps in (1, 3, 4):
        unet = Unet()
        picture = replace(PICTURE, steps=steps, sampler=name)
        latents = draw_latents(unet, [picture], text(0.1), text(-0.1), prediction=prediction, device="cpu")
        assert latents.shape == (1, 4, 4, 8) and latents.isfinite().all()
        assert unet.rows == [2] * passes(name, steps)


@pytest.mark.parametrize("name", ["dpmsolver", "dpmsolver++", "dpmsingle", "lms"])
def test_the_most_steps_that_a_prompt_may_ask_for(name):
    scheduler = build_scheduler(name, 1000, prediction=EPSILON)
    found = draw(lambda latents, timestep: latents.tanh(), initial_noises([1], (16, 16), 4), scheduler=scheduler)
    assert found.isfinite().all()


def test_another_name_for_the_same_sampler_draws_the_same():
    for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a"):
        pictures = [replace(PICTURE, sampler=sampler) for sampler in (name, f"k_{name}")]
        one, other = (draw_latents(Unet(), [p], text(1), None, prediction=EPSILON, device="cpu") for p in pictures)
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpm_2_a"])
def test_a_picture_depends_on_its_own_seed_alone(name):
    first, second = (replace(PICTURE, seed=seed, sampler=name) for seed in (7, 8))
    both = draw_latents(Unet(), [first, second], text(1), text(0), prediction=EPSILON, device="cpu")
    alone = draw_latents(Unet(), [second], text(1), text(0), prediction=EPSILON, device="cpu")
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both[0], both[1])
    state = torch.get_rng_state()
    again = draw_latents(Unet(), [second], text(1), text(0), prediction=EPSILON, device="cpu")
    assert torch.equal(again, alone) and torch.equal(torch.get_rng_state(), state)


def test_noise_on_the_way_is_not_that_of_the_start(monkeypatch):
    import diffusers.schedulers.scheduling_euler_ancestral_discrete as module

    draws = []
    original = module.randn_tensor
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: draws.append(original(*args, **kwargs)) or draws[-1])
    draw_latents(Unet(), [replace(PICTURE, sampler="euler_a")], text(1), None, prediction=EPSILON, device="cpu")
    start = initial_noises([PICTURE.seed], (PICTURE.width, PICTURE.height), 4)
    assert len(draws) == 3 and not torch.equal(draws[0], start) and not torch.equal(draws[0], draws[1])


def test_guidance_is_the_formula_and_takes_one_pass():
    unet, latents = Unet(), initial_noises([1, 2], (16, 16), 4)
    positive, negative = text(1.0).repeated(2), text(-2.0).repeated(2)
    found = guided(unet.predict, positive, negative, 5.0)(latents, 500.0)
    assert unet.rows == [4]
    with_prompt, without = (guided(unet.predict, one, None, 5.0)(latents, 500.0) for one in (positive, negative))
    torch.testing.assert_close(found, without + 5 * (with_prompt - without))
    assert unet.rows == [4, 2, 2]


def test_texts_of_different_lengths_are_a_mistake_of_ours():
    with pytest.raises(ValueError, match="different lengths"):
        guided(Unet().predict, text(1), TextInputs(torch.zeros(1, 6, 2)), 2.0)


def test_ticks_count_the_passes():
    for name in ("euler", "heun", "dpm_2"):
        ticks = []
        draw_latents(
            Unet(),
            [replace(PICTURE, sampler=name)],
            text(1),
            None,
            prediction=EPSILON,
            device="cpu",
            tick=lambda t=ticks: t.append(1),
        )
        assert len(ticks) == passes(name, PICTURE.steps)


def test_dpmsolver_in_its_first_form_is_the_published_second_order_step():
    """DPM-Solver-2M written out in half-log-SNR (arXiv 2206.00927), on the scheduler's own times."""
    scheduler = build_scheduler("dpmsolver", 16, prediction=EPSILON)
    x = initial_noises([3], (16, 16), 4).double()
    found = draw(lambda latents, timestep: latents.tanh(), x.float(), scheduler=scheduler)
    sigmas = scheduler.sigmas.double()
    alphas = 1 / (sigmas**2 + 1).sqrt()
    levels, half_log_snr, previous = sigmas * alphas, -sigmas.log(), None
    for step in range(len(sigmas) - 1):
        noise, h = x.tanh(), half_log_snr[step + 1] - half_log_snr[step]
        slope = 0.0 if previous is None else (noise - previous) * (h / (half_log_snr[step] - half_log_snr[step - 1]))
        x = alphas[step + 1] / alphas[step] * x - levels[step + 1] * math.expm1(h) * (noise + slope / 2)
        previous = noise
    torch.testing.assert_close(found.double(), x, rtol=2e-4, atol=2e-4)
    assert sigmas[-1] == pytest.approx(0.0292, abs=1e-4)  # of timestep 0


def test_weights_of_the_multistep_integrate_polynomials_exactly():
    known, end = [3.0, 4.0, 5.5, 7.0], 2.0
    for power in range(4):
        found = sum(weight(known, number, end) * sigma**power for number, sigma in enumerate(known))
        assert found == pytest.approx((end ** (power + 1) - 3.0 ** (power + 1)) / (power + 1))


def test_the_multistep_solves_a_polynomial_path():
    """Where the derivative is a cubic in sigma, steps of fourth order are exact once four derivatives are known."""
    scheduler = build_scheduler("lms", 10, prediction=EPSILON)
    assert isinstance(scheduler, LinearMultistep)
    sigmas = scheduler.levels.sigmas.tolist()
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    path = []
    for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=False):
        (x,) = scheduler.step(torch.full_like(x, 4 * sigma**3), timestep, x)
        path.append(float(x))
    for step in range(4, len(path)):
        assert path[step] - path[3] == pytest.approx(sigmas[step + 1] ** 4 - sigmas[4] ** 4, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gpu_draws_what_the_cpu_draws(name):
    """The schedules stay on the CPU and noise is drawn there, so only rounding differs."""
    picture = replace(PICTURE, sampler=name, steps=6)
    here, there = (
        draw_latents(
            Unet(),
            [picture],
            TextInputs(torch.full((1, 5, 2), 0.1, device=device)),
            TextInputs(torch.full((1, 5, 2), -0.1, device=device)),
            prediction=EPSILON,
            device=device,
        )
        for device in ("cpu", "cuda")
    )
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
