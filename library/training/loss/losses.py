"""How far a prediction is from its target, and how much that counts.

Recorded numbers: tests/golden (training_math, sd_training_math).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from library.options.loss import THRESHOLD_LOSSES

if TYPE_CHECKING:
    from library.options.loss import LossOptions

SMALLEST_WEIGHTED_SIGMA = 1e-3  # one step of a 1000-step table: 1/sigma^2 stays finite at sigma 0


def elementwise_loss(
    prediction: Tensor, target: Tensor, options: LossOptions, *, timesteps: Tensor, alpha_bars: Tensor | None = None
) -> Tensor:
    """Loss of every element, in float32. What steers the Huber threshold: see :func:`huber_threshold`."""
    threshold = huber_threshold(options, timesteps, alpha_bars) if options.loss_type in THRESHOLD_LOSSES else None
    return LOSSES[options.loss_type](prediction.float(), target.float(), threshold)


def per_sample_mean(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all but the batch dimension -> (B,). ``mask`` (B, 1, h, w) in [0, 1] multiplies; its area does not matter."""
    if mask is not None:
        assert mask.shape[-2:] == loss.shape[-2:]  # masks are made on the latent grid
        loss = loss * mask
    return loss.flatten(1).mean(1)


def huber_threshold(options: LossOptions, timesteps: Tensor, alpha_bars: Tensor | None = None) -> Tensor:
    """Where the Huber losses turn from square to straight, (B,). ``timesteps`` (B,) float32 in 0..1000.

    ``alpha_bars`` (B,): the signal's share of the power there, which the schedule ``snr`` needs and flow models do not have.
    """
    return HUBER_SCHEDULES[options.huber_schedule](options, timesteps, alpha_bars)


def _l2(prediction: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
    return F.mse_loss(prediction, target, reduction="none")


def _l1(prediction: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
    return F.l1_loss(prediction, target, reduction="none")


def _huber(prediction: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
    assert threshold is not None
    c = _per_element(threshold, target)
    return 2 * c * _root_distance(prediction - target, c)


def _smooth_l1(prediction: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
    assert threshold is not None
    return 2 * _root_distance(prediction - target, _per_element(threshold, target))


def _per_element(threshold: Tensor, like: Tensor) -> Tensor:
    return threshold.float().reshape(-1, *[1] * (like.dim() - 1))  # (B, 1, 1, 1)


def _root_distance(difference: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, in the form that loses no digits when d is small."""
    square = difference * difference
    return square / ((square + c * c).sqrt() + c)


# name -> loss of every element of (prediction, target, threshold (B,) or None)
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "l2": _l2,
    "l1": _l1,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
}


def _constant_threshold(options: LossOptions, timesteps: Tensor, alpha_bars: Tensor | None) -> Tensor:
    return torch.full_like(timesteps, options.huber_c * options.huber_scale)


def _exponential_threshold(options: LossOptions, timesteps: Tensor, alpha_bars: Tensor | None) -> Tensor:
    """From 1 at timestep 0 to huber_c at timestep 1000, both times huber_scale."""
    return torch.exp(math.log(options.huber_c) / 1000 * timesteps) * options.huber_scale


def _snr_threshold(options: LossOptions, timesteps: Tensor, alpha_bars: Tensor | None) -> Tensor:
    """From 1 without noise to huber_c without signal, whatever huber_scale: c + (1 - c) / (1 + s)^2 with s = sqrt((1 - a) / a),
    in the form that has no s, which is infinite without signal."""
    assert alpha_bars is not None  # flow_problems() refuses it
    both = alpha_bars.sqrt() + (1 - alpha_bars).sqrt()
    return options.huber_c + (1 - options.huber_c) * alpha_bars / both**2


# name -> threshold (B,) of (options, timesteps (B,) float32 in 0..1000, alpha bars (B,) or None)
HUBER_SCHEDULES: dict[str, Callable[[LossOptions, Tensor, Tensor | None], Tensor]] = {
    "constant": _constant_threshold,
    "exponential": _exponential_threshold,
    "snr": _snr_threshold,
}


def flow_loss_weights(weighting_scheme: str, sigmas: Tensor) -> Tensor:
    """Weight of each sample's loss (B,), from its sigma (B,). Schemes that only change what is drawn weigh 1. All are finite."""
    weigh = LOSS_WEIGHTINGS.get(weighting_scheme)
    return torch.ones_like(sigmas) if weigh is None else weigh(sigmas)


def _sigma_sqrt(sigmas: Tensor) -> Tensor:
    return sigmas.clamp_min(SMALLEST_WEIGHTED_SIGMA) ** -2.0


def _cosmap(sigmas: Tensor) -> Tensor:
    return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))  # SD3, arXiv 2403.03206, section 3.1


LOSS_WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {"sigma_sqrt": _sigma_sqrt, "cosmap": _cosmap}


def image_scale(weighting_scheme: str, sigmas: Tensor) -> Tensor:
    """What an error of the velocity is multiplied with to be one of the guessed image, ``x_t - sigma * velocity``: sigma (B,).

    At sigma 0 the scheme ``sigma_sqrt`` gets the smallest sigma that its weights know: there 1/sigma^2 times the squared error of
    the image, 0 times infinity, is the squared error of the velocity, as at every other sigma.
    """
    return sigmas.clamp_min(SMALLEST_WEIGHTED_SIGMA) if weighting_scheme == "sigma_sqrt" else sigmas
