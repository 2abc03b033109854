"""Samplers of rectified-flow models: from noise at sigma 1 to an image at sigma 0.

A flow model is trained on ``x = alpha * image + sigma * noise`` with ``alpha = 1 - sigma``, and predicts the velocity
``noise - image``; so its guess of the image is ``x - sigma * velocity``. B pictures are drawn at once; each has its own seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.randomness import torch_generator

Predict = Callable[[Tensor, Tensor, Any], Tensor]  # (latents (B, ...), sigmas (B,), conditioning) -> velocity (B, ...)
Velocity = Callable[[Tensor, float], Tensor]  # (latents (B, ...), sigma) -> velocity (B, ...)
StepNoise = Callable[[int], Tensor]  # number of the step -> standard normal noise (B, ...)
Gain = Callable[[Tensor], Tensor]

INTEGRAL_POINTS = 200  # as in the implementation by the paper's authors and in ComfyUI
ER_SDE_STAGES = 3
TABLE_END = 1e-3  # of a table of 1000 noise levels, before it is shifted


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings:
    """How pictures are drawn."""

    steps: int
    shift: float  # above 1 = more of the steps at high noise
    scale: float  # of classifier-free guidance, 1 = none
    sampler: str = "euler"
    schedule: str = "even"  # one of SCHEDULES
    cfg_trunc_ratio: float | None = None  # guidance while 1 - sigma is below it; None, 1 and more = always
    renorm_cfg: float | None = None  # longest guided velocity, in lengths of the one with the prompt; None and 0 = any


def draw_flow(  # noqa: PLR0913  # what a picture needs
    predict: Predict, noise: Tensor, *, positive: Any, negative: Any | None, settings: FlowSettings, seeds: Sequence[int]
) -> Tensor:
    """noise (B, C, h, w), one of ``seeds`` for each row -> scaled latents (B, C, h, w) in the dtype of ``noise``.

    ``positive`` and ``negative`` go to ``predict`` as they are; ``negative`` None = without guidance. A row depends on its own
    noise, seed and conditioning alone, except for rounding.
    """
    sigmas = flow_sigmas(settings.steps, settings.shift, schedule=settings.schedule)
    velocity = guided(predict, positive, negative, settings)
    return SAMPLERS[settings.sampler](velocity, noise, sigmas, lambda step: step_noise(seeds, step, noise))


def flow_sampler_name(*wanted: str | None) -> str:
    """The first of ``wanted`` names that a flow model has a sampler for; else euler."""
    return next((name for name in wanted if name in SAMPLERS), "euler")


def flow_sigmas(steps: int, shift: float, *, schedule: str = "even") -> Tensor:
    """(steps + 1,) in fp32 on the CPU: from 1 to 0, shifted towards noise."""
    return SCHEDULES[schedule](steps, shift)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)  # SD3, arXiv 2403.03206, section 5.3.2


def even_sigmas(steps: int, shift: float) -> Tensor:
    """Even steps, then shifted: as Anima and Lumina are drawn."""
    return shifted(torch.linspace(1, 0, steps + 1), shift)


def table_sigmas(steps: int, shift: float) -> Tensor:
    """Even steps from 1 to the last level of the shifted table of 1000, which are shifted once more, then 0: as SD3 is drawn."""
    last = shift * TABLE_END / (1 + (shift - 1) * TABLE_END)
    return torch.cat([shifted(torch.linspace(1, last, steps), shift), torch.zeros(1)])


SCHEDULES: dict[str, Callable[[int, float], Tensor]] = {"even": even_sigmas, "table": table_sigmas}


def guided(predict: Predict, positive: Any, negative: Any | None, settings: FlowSettings) -> Velocity:
    """``negative + scale * (positive - negative)`` (classifier-free guidance, arXiv 2207.12598); without a negative one pass.

    For a flow this is guidance of the guessed image too: both are x - sigma * velocity of the same x. Beyond cfg_trunc_ratio the
    negative pass is left out.
    """
    ratio, longest = settings.cfg_trunc_ratio, settings.renorm_cfg

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        sigmas = latents.new_full((latents.shape[0],), sigma, dtype=torch.float32)  # a fill: nothing waits for the device
        with_prompt = predict(latents, sigmas, positive)
        if negative is None or (ratio is not None and 1 - sigma >= ratio):
            return with_prompt
        out = torch.lerp(predict(latents, sigmas, negative), with_prompt, settings.scale)
        return not_longer(out, with_prompt, longest) if longest else out

    return velocity


def not_longer(velocity: Tensor, plain: Tensor, longest: float) -> Tensor:
    """``velocity`` (B, ...), where its 2-norm exceeds ``longest`` times that of ``plain`` scaled down to it, sample by sample."""
    norm, limit = (torch.linalg.vector_norm(one.float().flatten(1), dim=1) for one in (velocity, plain))  # (B,)
    factor = (longest * limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)
    return velocity * factor.to(velocity.dtype).reshape(-1, *[1] * (velocity.dim() - 1))


def step_noise(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Standard normal noise in the shape (B, ...), dtype and place of ``like``: a function of each row's seed and of the step.

    Drawn on the CPU in fp32, so that it is the same on every machine.
    """
    shape = like.shape[1:]
    rows = [torch.randn(shape, generator=torch_generator("flow sampler", seed, step)) for seed in seeds]
    return torch.stack(rows).to(like.device, like.dtype, non_blocking=True)


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor, noise_of: StepNoise) -> Tensor:
    """Straight steps along the flow. Draws no noise."""
    levels = sigmas.tolist()
    for step in range(len(levels) - 1):
        moved = velocity(latents, levels[step])
        latents = latents + moved * (sigmas[step + 1] - sigmas[step]).item()
    return latents


def slowing_gain(lambdas: Tensor) -> Tensor:
    """``exp(lambda^0.3) + 10``: with it phi is the noise scale that the paper's authors and ComfyUI take by default."""
    return (lambdas**0.3).exp() + 10


def er_sde(  # noqa: PLR0913  # what the solver is made of; all but four are for tests and experiments
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    noise_of: StepNoise,
    *,
    stages: int = ER_SDE_STAGES,
    gain: Gain = slowing_gain,
) -> Tensor:
    """Extended reverse-time SDE solver (ER-SDE-Solver-1, 2, 3; arXiv 2309.06169), as ComfyUI draws Anima by default.

    With lambda = sigma / alpha, phi(lambda) = lambda * gain(lambda), and D the guess of the image, the paper solves a step from
    s to t (lambda_t < lambda_s) in the form of its variance-preserving solver as

        x_t = alpha_t/alpha_s * phi_t/phi_s * x_s + alpha_t * (1 - phi_t/phi_s) * D_s
            + alpha_t * (lambda_t - lambda_s + phi_t * I0) * D_s'                                            (from stage 2 on)
            + alpha_t * ((lambda_t - lambda_s)^2 / 2 + phi_t * I1) * D_s''                                          (stage 3)
            + alpha_t * sqrt(lambda_t^2 - lambda_s^2 * (phi_t/phi_s)^2) * z,         z standard normal

    where I0 is the integral of 1/phi and I1 that of (lambda - lambda_s)/phi from lambda_t to lambda_s (200 points), and the
    derivatives with respect to lambda are divided differences of the steps before. The first step has none, the second one.

    Written with rho = gain_t/gain_s nothing is infinite at sigma 1, where alpha_s is 0 and lambda_s has no end:

        alpha_t/alpha_s * phi_t/phi_s = sigma_t/sigma_s * rho,     phi_t/phi_s = lambda_t/lambda_s * rho,
        alpha_t * sqrt(...) = sigma_t * sqrt(1 - rho^2)

    There the default gain is infinite too, so rho is 0 and the first step is x_t = alpha_t * D_s + sigma_t * z exactly; slopes
    from that point are 0. The last step, to sigma 0, gives D_s without noise. A gain of 1 leaves no noise at all: DDIM, which for
    a flow is Euler.
    """
    path = _Path(sigmas.double(), gain)
    slopes = _Slopes(path.lambdas.tolist(), stages)
    for step in range(len(sigmas) - 1):
        sigma = float(sigmas[step])
        image = latents - sigma * velocity(latents, sigma)
        if sigmas[step + 1] == 0:
            return image
        derivatives = slopes.add(step, image)
        latents = path.kept(step) * latents + path.pulled(step) * image
        for factor, derivative in zip(path.corrections(step) if derivatives else (), derivatives, strict=False):
            latents = latents + factor * derivative
        spread = path.spread(step)
        if spread:
            latents = latents + spread * noise_of(step)
    return latents


class _Path:
    """The numbers of each step from s = ``step`` to t = ``step + 1``, computed on the CPU in float64."""

    def __init__(self, sigmas: Tensor, gain: Gain):
        self.sigmas, self.gain = sigmas, gain
        self.alphas = 1 - sigmas
        self.lambdas = sigmas / self.alphas  # infinite at sigma 1
        self.gains = gain(self.lambdas)

    def rho(self, step: int) -> Tensor:
        return self.gains[step + 1] / self.gains[step]

    def kept(self, step: int) -> float:
        """What stays of the latents."""
        return float(self.sigmas[step + 1] / self.sigmas[step] * self.rho(step))

    def pulled(self, step: int) -> float:
        """What is taken of the guessed image."""
        return float(self.alphas[step + 1] * (1 - self.lambdas[step + 1] / self.lambdas[step] * self.rho(step)))

    def spread(self, step: int) -> float:
        """Standard deviation of the new noise."""
        return float(self.sigmas[step + 1] * (1 - self.rho(step) ** 2).clamp_min(0).sqrt())

    def corrections(self, step: int) -> tuple[float, float]:
        """The factors of the first and the second derivative; lambda_s is finite where there are any."""
        start, end = self.lambdas[step], self.lambdas[step + 1]
        width = (start - end) / INTEGRAL_POINTS
        points = end + width * torch.arange(INTEGRAL_POINTS, dtype=torch.float64)  # each piece by the value at its lower end
        parts = width * end * self.gains[step + 1] / (points * self.gain(points))  # times phi_t
        move, alpha = end - start, self.alphas[step + 1]
        return float(alpha * (move + parts.sum())), float(alpha * (move**2 / 2 + (parts * (points - start)).sum()))


class _Slopes:
    """Divided differences of the guessed images over lambda, of the present and the two steps before."""

    def __init__(self, lambdas: Sequence[float], stages: int):
        self.lambdas, self.stages = lambdas, stages
        self.image: Tensor | None = None
        self.slope: Tensor | None = None

    def add(self, step: int, image: Tensor) -> list[Tensor]:
        """The first and the second derivative at ``step``, as far as there are steps enough and stages ask for them."""
        found: list[Tensor] = []
        before, lambdas = self.image, self.lambdas
        if self.stages > 1 and before is not None:
            slope = (image - before) / (lambdas[step] - lambdas[step - 1])
            found = [slope]
            if self.stages > 2 and self.slope is not None:
                found.append((slope - self.slope) / ((lambdas[step] - lambdas[step - 2]) / 2))
            self.slope = slope
        self.image = image if math.isfinite(lambdas[step]) else None  # over an infinite distance every slope is 0
        return found


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Tensor, StepNoise], Tensor]] = {"euler": euler, "er_sde": er_sde}
