"""The sampler "lms": Adams-Bashforth steps in sigma. diffusers has it too, but only where scipy is installed, for integrals of
polynomials that can be written down."""

from __future__ import annotations

from typing import Any

from numpy.polynomial import Polynomial
from torch import Tensor

ORDER = 4  # derivatives that a step looks back on


class LinearMultistep:
    """In the form of a diffusers scheduler. ``levels``: one of diffusers' Euler schedulers, for its times and noise levels."""

    def __init__(self, levels: Any, *, order: int = ORDER):
        self.levels, self.order = levels, order
        self.derivatives: list[Tensor] = []  # the latest first
        self.done = 0  # steps

    def set_timesteps(self, steps: int) -> None:
        self.levels.set_timesteps(steps)
        self.derivatives, self.done = [], 0

    @property
    def timesteps(self) -> Tensor:
        return self.levels.timesteps

    @property
    def init_noise_sigma(self) -> float:
        return self.levels.init_noise_sigma

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample / (float(self.levels.sigmas[self.done]) ** 2 + 1) ** 0.5

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """model_output and sample (B, C, h, w) at the present noise level -> the sample at the next one."""
        sigmas = self.levels.sigmas.tolist()
        derivative = self._derivative(model_output, sample, sigmas[self.done])
        self.derivatives = [derivative, *self.derivatives][: self.order]
        known = [sigmas[self.done - back] for back in range(len(self.derivatives))]
        for number, earlier in enumerate(self.derivatives):
            sample = sample + weight(known, number, sigmas[self.done + 1]) * earlier
        self.done += 1
        return (sample,)

    def _derivative(self, output: Tensor, sample: Tensor, sigma: float) -> Tensor:
        """d sample / d sigma, which for a model that predicts noise is its prediction."""
        if self.levels.config.prediction_type == "epsilon":
            return output
        # x = image + sigma * noise and v = (noise - sigma * image) / sqrt(sigma^2 + 1); so noise is this
        return output / (sigma**2 + 1) ** 0.5 + sample * (sigma / (sigma**2 + 1))


def weight(known: list[float], number: int, end: float) -> float:
    """The integral from ``known[0]`` to ``end`` of the polynomial that is 1 at ``known[number]`` and 0 at the others."""
    others = [sigma for index, sigma in enumerate(known) if index != number]
    basis = Polynomial.fromroots(others) if others else Polynomial([1.0])
    integral = (basis / basis(known[number])).integ()
    return float(integral(end) - integral(known[0]))
