"""Noise of models with a table of a thousand noise levels (DDPM): Stable Diffusion 1, 2 and XL.

x_t = sqrt(a_t) * x_0 + sqrt(1 - a_t) * noise, where a_t ("alpha bar", the share of the signal's power) falls from nearly 1 at
timestep 0 to nearly 0 at timestep 999. The denoiser predicts the noise, or the velocity sqrt(a_t) * noise - sqrt(1 - a_t) * x_0.
Recorded numbers: tests/golden (sd_training_math).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.options.ddpm import TIMESTEPS
from library.training.loss.losses import elementwise_loss, per_sample_mean
from library.training.loss.noise import Draws, model_input_noise, training_noise
from library.training.loss.objective import NoisyLatents
from library.training.validating.validation_plan import validation_timesteps

if TYPE_CHECKING:
    from library.options.ddpm import DdpmOptions, DdpmTrainingOptions
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions

FIRST_BETA, LAST_BETA = 0.00085, 0.012  # latent diffusion, arXiv 2112.10752; all Stable Diffusion models since
HIGHEST_SNR = 1000.0  # only the very first timesteps are above: all weights but min-SNR's take these for equally clear


class DdpmObjective:
    """Holds options and the table of noise levels; every number it draws is a function of the arguments of :meth:`corrupt`."""

    def __init__(self, ddpm: DdpmTrainingOptions, noise: NoiseOptions, loss: LossOptions):
        self.ddpm = ddpm
        self.noise = noise
        self.loss_options = loss
        self._levels = NoiseLevels.of(ddpm)

    def corrupt(self, latents: Tensor, *, seed: int, step: int, positions: Sequence[int],
                dtype: torch.dtype = torch.float32) -> NoisyLatents:  # fmt: skip
        draws = Draws(seed, step, positions, latents.device)
        timesteps = timesteps_of(draws.uniform("timestep"), self.ddpm.drawn)
        noise = training_noise(latents, self.noise, draws)
        input_noise = model_input_noise(noise, self.noise, draws)
        return replace(self.corrupt_with(latents, noise, timesteps, input_noise=input_noise, dtype=dtype), draws=draws)

    def corrupt_with(self, latents: Tensor, noise: Tensor, timesteps: Tensor, *, input_noise: Tensor | None = None,
                     dtype: torch.dtype = torch.float32) -> NoisyLatents:  # fmt: skip
        """The same with given noise (B, C, h, w) and timesteps (B,) int64 in 0..999.

        ``input_noise`` replaces the noise in the model's input, but not in the target.
        """
        levels = self._levels_on(latents.device)
        latents, noise = latents.float(), noise.float()
        in_input = noise if input_noise is None else input_noise.float()
        return NoisyLatents(
            latents=levels.mixed(latents, in_input, timesteps).to(dtype),
            sigmas=levels.noise[timesteps],
            timesteps=timesteps,
            target=levels.velocity(latents, noise, timesteps) if self.ddpm.v_parameterization else noise,
            loss_weights=levels.loss_weights[timesteps],
        )

    def validation_timesteps(self) -> tuple[int, ...]:
        """Timesteps in 0..999."""
        return validation_timesteps(*self.ddpm.timestep_bounds)

    def corrupt_at(self, latents: Tensor, noise: Tensor, timestep: int, *, dtype: torch.dtype = torch.float32) -> NoisyLatents:
        timesteps = torch.full((latents.shape[0],), timestep, device=latents.device)  # a fill: nothing waits for the device
        return self.corrupt_with(latents, noise, timesteps, dtype=dtype)

    def loss(self, prediction: Tensor, noisy: NoisyLatents, *, sample_weights: Tensor, mask: Tensor | None = None) -> Tensor:
        alpha_bars = self._levels_on(noisy.timesteps.device).alpha_bars[noisy.timesteps]
        loss = elementwise_loss(
            prediction, noisy.target, self.loss_options, timesteps=noisy.timesteps.float(), alpha_bars=alpha_bars
        )
        return per_sample_mean(loss, mask) * noisy.loss_weights * sample_weights

    def loss_settings(self) -> tuple[object, ...]:
        return self.loss_options, replace(self.ddpm, min_timestep=None, max_timestep=None)

    def _levels_on(self, device: torch.device) -> NoiseLevels:
        """The table on ``device``, where it stays: it moves with the first batch."""
        if self._levels.noise.device != device:
            self._levels = self._levels.to(device)
        return self._levels


def timesteps_of(uniform: Tensor, drawn: range) -> Tensor:
    """U(0, 1) draws (B,) -> whole timesteps (B,) int64, all of ``drawn`` alike."""
    return drawn.start + (uniform * len(drawn)).long().clamp_max(len(drawn) - 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoiseLevels:
    """What each timestep means. All tensors (1000,) float32, on one device."""

    alpha_bars: Tensor  # share of the signal's power
    signal: Tensor  # what the latents are multiplied with
    noise: Tensor  # what the noise is multiplied with
    loss_weights: Tensor

    @classmethod
    def of(cls, ddpm: DdpmOptions) -> NoiseLevels:
        published = published_alpha_bars()
        alpha_bars = zero_terminal_snr(published) if ddpm.zero_terminal_snr else published
        # the weights keep the SNR of the published levels, as in the reference: none of these is 0
        weights = ddpm_loss_weights(ddpm, signal_to_noise(published))
        return cls(alpha_bars=alpha_bars, signal=alpha_bars.sqrt(), noise=(1 - alpha_bars).sqrt(), loss_weights=weights)

    def to(self, device: torch.device) -> NoiseLevels:
        return NoiseLevels(**{table.name: getattr(self, table.name).to(device) for table in fields(self)})

    def mixed(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return _each(self.signal[timesteps]) * latents + _each(self.noise[timesteps]) * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """How x_t changes with the angle whose cosine is the signal's factor (arXiv 2202.00512, appendix D)."""
        return _each(self.signal[timesteps]) * noise - _each(self.noise[timesteps]) * latents


def _each(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)  # (B, 1, 1, 1)


def published_betas() -> Tensor:
    """(1000,) float32, how much noise each step adds: their square roots lie evenly between those of the first and the last."""
    return torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS) ** 2


def published_alpha_bars() -> Tensor:
    """(1000,) float32. With more digits the SNR of the first timesteps, where 1 - a is small, would not be everybody's."""
    return (1 - published_betas()).cumprod(0)


def zero_terminal_snr(alpha_bars: Tensor) -> Tensor:
    """The last level becomes pure noise, the first stays as it is (arXiv 2305.08891, algorithm 1)."""
    signal = alpha_bars.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)) ** 2


def signal_to_noise(alpha_bars: Tensor) -> Tensor:
    return alpha_bars / (1 - alpha_bars)


def ddpm_loss_weights(ddpm: DdpmOptions, snr: Tensor) -> Tensor:
    """Weight of the loss at each signal-to-noise ratio (N,): the product of all that is asked for; else 1."""
    is_velocity, capped = ddpm.v_parameterization, snr.clamp_max(HIGHEST_SNR)
    velocity_like = capped / (capped + 1)  # of a velocity's loss: what a prediction of noise would have
    weights = torch.ones_like(snr)
    if ddpm.min_snr_gamma:  # arXiv 2303.09556, section 3.4
        weights = weights * snr.clamp_max(ddpm.min_snr_gamma) / (snr + 1 if is_velocity else snr)
    if ddpm.scale_v_pred_loss_like_noise_pred:
        weights = weights * velocity_like
    if ddpm.v_pred_like_loss:
        weights = weights * (1 + ddpm.v_pred_like_loss / velocity_like)
    if ddpm.debiased_estimation_loss:  # arXiv 2310.08442
        weights = weights / (capped + 1 if is_velocity else capped.sqrt())
    return weights
