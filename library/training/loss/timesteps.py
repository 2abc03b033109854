"""How noisy each training sample is: random draws -> sigmas of the flow models.

``sigma`` is the share of noise in a latent: 0 = image, 1 = noise. Every sampling is a function of draws from a standard
distribution, so that the same draws always give the same sigmas, whatever device or process made them.
Recorded numbers: tests/golden (training_math).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.options.flow import SampledFlowOptions, Sd3FlowOptions

if TYPE_CHECKING:
    from library.options.flow import FlowOptions

TABLE_STEPS = 1000  # the samplings that come from a table of timesteps have this many
BASE_TOKENS, MAX_TOKENS = 256, 4096  # FLUX: the shift grows with the image between these two token counts ...
BASE_MU, MAX_MU = 0.5, 1.15  # ... from exp(0.5) to exp(1.15)

DrawKind = Literal["uniform", "normal"]


@dataclass(frozen=True, slots=True)
class SigmaSampler:
    """``draw``: distribution of the raw numbers, U(0, 1) or N(0, 1). ``to_sigmas(draws (B,), latent (h, w)) -> (B,)``, in the
    range of --min_timestep and --max_timestep. ``rounds_down``: the timesteps are whole numbers, 0 to 999."""

    draw: DrawKind
    to_sigmas: Callable[[Tensor, tuple[int, int]], Tensor]
    rounds_down: bool = False


def sigma_sampler(flow: FlowOptions) -> SigmaSampler:
    """The sampler of the options: SD3's densities, or what ``--timestep_sampling`` names."""
    if isinstance(flow, Sd3FlowOptions):
        return _whole_timestep_sampler(flow)
    assert isinstance(flow, SampledFlowOptions)
    sampling = _table_sampling(flow) if flow.timestep_sampling == "sigma" else SAMPLINGS[flow.timestep_sampling]
    return SigmaSampler(sampling.draw, lambda draws, latent_hw: into_range(sampling.to_sigmas(draws, flow, latent_hw), flow))


def sample_sigmas(draws: Tensor, flow: FlowOptions, *, latent_hw: tuple[int, int]) -> Tensor:
    """Raw draws (B,) of the sampler's kind -> sigmas (B,) float32, in the range of --min_timestep and --max_timestep."""
    return sigma_sampler(flow).to_sigmas(draws.float(), latent_hw)


def into_range(sigmas: Tensor, flow: FlowOptions) -> Tensor:
    """Maps [0, 1] linearly onto [min_timestep / 1000, max_timestep / 1000], keeping the shape of the distribution.

    Neither bound given: the very same numbers. Equal bounds: always that timestep.
    """
    if flow.min_timestep is None and flow.max_timestep is None:
        return sigmas
    low, high = (bound / TABLE_STEPS for bound in flow.timestep_bounds)
    return low + (high - low) * sigmas


def whole_timesteps(levels: Tensor, flow: FlowOptions) -> Tensor:
    """Levels in [0, 1], 1 = most noise -> whole timesteps (float32), min_timestep and up, below max_timestep."""
    low, high = flow.timestep_bounds
    return (levels * (high - low) + low).floor().clamp(low, max(low, high - 1))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Moves sigmas towards noise for shift > 1. Exact at both ends: 0 -> 0 and 1 -> 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)  # SD3, arXiv 2403.03206, section 5.3.2


def resolution_mu(latent_hw: tuple[int, int]) -> float:
    """FLUX's logarithm of the shift: linear in the number of 2x2 patches of the latent."""
    tokens = (latent_hw[0] // 2) * (latent_hw[1] // 2)
    return BASE_MU + (tokens - BASE_TOKENS) * (MAX_MU - BASE_MU) / (MAX_TOKENS - BASE_TOKENS)


def time_shift(sigmas: Tensor, mu: float) -> Tensor:
    """exp(mu) / (exp(mu) + 1/sigma - 1), written without the division by sigma that is 0/0 at the ends."""
    return shift_sigmas(sigmas, math.exp(mu))


def table_sigmas(unit: Tensor, shift: float) -> Tensor:
    """Positions in [0, 1] -> sigmas of a table of 1000 steps that falls from 1 to 1/1000, then shifted. Never 0."""
    index = (unit * TABLE_STEPS).floor().clamp(0, TABLE_STEPS - 1)
    return shift_sigmas((TABLE_STEPS - index) / TABLE_STEPS, shift)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What ``--timestep_sampling`` names: ``to_sigmas(draws (B,), flow, latent (h, w)) -> (B,)`` in [0, 1]."""

    draw: DrawKind
    to_sigmas: Callable[[Tensor, SampledFlowOptions, tuple[int, int]], Tensor]


def _uniform(draws: Tensor, flow: SampledFlowOptions, latent_hw: tuple[int, int]) -> Tensor:
    return draws


def _sigmoid(draws: Tensor, flow: SampledFlowOptions, latent_hw: tuple[int, int]) -> Tensor:
    return torch.sigmoid(flow.sigmoid_scale * draws)


def _shift(draws: Tensor, flow: SampledFlowOptions, latent_hw: tuple[int, int]) -> Tensor:
    return shift_sigmas(torch.sigmoid(flow.sigmoid_scale * draws), flow.discrete_flow_shift)


def _nextdit_shift(draws: Tensor, flow: SampledFlowOptions, latent_hw: tuple[int, int]) -> Tensor:
    return time_shift(draws, resolution_mu(latent_hw))


def _flux_shift(draws: Tensor, flow: SampledFlowOptions, latent_hw: tuple[int, int]) -> Tensor:
    return time_shift(torch.sigmoid(flow.sigmoid_scale * draws), resolution_mu(latent_hw))


SAMPLINGS: dict[str, Sampling] = {
    "uniform": Sampling("uniform", _uniform),
    "sigmoid": Sampling("normal", _sigmoid),
    "shift": Sampling("normal", _shift),
    "nextdit_shift": Sampling("uniform", _nextdit_shift),
    "flux_shift": Sampling("normal", _flux_shift),
}


def _table_sampling(flow: SampledFlowOptions) -> Sampling:
    """``sigma``: places in a table of timesteps, drawn from the density that ``--weighting_scheme`` names."""
    density = DENSITIES[flow.weighting_scheme]
    return Sampling(
        density.draw, lambda draws, flow, latent_hw: table_sigmas(density.to_unit(draws, flow), flow.discrete_flow_shift)
    )


def _whole_timestep_sampler(flow: Sd3FlowOptions) -> SigmaSampler:
    """SD3: the density's number is the noise level itself, before the shift and before it is rounded down."""
    density = DENSITIES[flow.weighting_scheme]

    def to_sigmas(draws: Tensor, latent_hw: tuple[int, int]) -> Tensor:
        levels = density.to_unit(draws, flow).clamp(0, 1)  # a steep mode leaves the range
        return whole_timesteps(shift_sigmas(levels, flow.training_shift), flow) / TABLE_STEPS

    return SigmaSampler(density.draw, to_sigmas, rounds_down=True)


@dataclass(frozen=True, slots=True)
class Density:
    """``to_unit(draws (B,), flow) -> (B,)`` in [0, 1]: where in a falling table of timesteps to look (0 = most noise), or a noise
    level (1 = most noise)."""

    draw: DrawKind
    to_unit: Callable[[Tensor, FlowOptions], Tensor]


def _flat(draws: Tensor, flow: FlowOptions) -> Tensor:
    return draws


def _logit_normal(draws: Tensor, flow: FlowOptions) -> Tensor:
    return torch.sigmoid(flow.logit_mean + flow.logit_std * draws)


def _mode(draws: Tensor, flow: FlowOptions) -> Tensor:
    return 1 - draws - flow.mode_scale * (torch.cos(math.pi * draws / 2) ** 2 - 1 + draws)  # SD3, arXiv 2403.03206, eq. 20


# Schemes that only weigh the loss draw uniformly.
DENSITIES: dict[str, Density] = {
    "none": Density("uniform", _flat),
    "uniform": Density("uniform", _flat),
    "sigma_sqrt": Density("uniform", _flat),
    "cosmap": Density("uniform", _flat),
    "logit_normal": Density("normal", _logit_normal),
    "mode": Density("uniform", _mode),
}
