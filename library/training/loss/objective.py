"""What a training step asks of the denoiser: how latents are corrupted, what it should answer, and how that is judged.

One class for each family, with the methods of :class:`Objective`. :class:`FlowObjective` is rectified flow (Anima, Lumina, SD3):
x_t = sigma * noise + (1 - sigma) * x_0, and the denoiser predicts the velocity noise - x_0. ``DdpmObjective`` of
library/training/loss/ddpm.py is the other one (Stable Diffusion 1, 2 and XL).

The loss of a flow model compares velocities, or guesses of the image (SD3; Lumina with ``sigma_scaled``): these are
x_t - sigma * velocity, so that their errors are sigma times those of the velocity, with the other sign, and no loss asks for the
sign. With extra noise on the input (ip_noise_gamma) too it is the error of the velocity that counts, so that this noise stays out
of what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from library.errors import OptionError
from library.training.loss.losses import elementwise_loss, flow_loss_weights, image_scale, per_sample_mean
from library.training.loss.noise import Draws, model_input_noise, training_noise
from library.training.loss.timesteps import sample_sigmas, sigma_sampler
from library.training.validating.validation_plan import validation_timesteps

if TYPE_CHECKING:
    from library.options.flow import FlowOptions
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions

TIMESTEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoisyLatents:
    """What the denoiser sees and what it should answer, for B samples."""

    latents: Tensor  # (B, C, h, w) corrupted, in the dtype asked for
    sigmas: Tensor  # (B,) float32 in [0, 1], what the noise was multiplied with; 1 = pure noise
    timesteps: Tensor  # (B,) flow: float32, sigma * 1000; DDPM: int64, 0..999
    target: Tensor  # (B, C, h, w) float32
    loss_weights: Tensor  # (B,) float32, how much the loss at this noise level counts
    draws: Draws | None = None  # what else training draws at random for these samples; None outside of training


class Objective(Protocol):
    """What training and validation need of a family of noise."""

    def corrupt(self, latents: Tensor, *, seed: int, step: int, positions: Sequence[int],
                dtype: torch.dtype = torch.float32) -> NoisyLatents:  # fmt: skip
        """Latents (B, C, h, w), scaled, with noise and noise levels drawn for these samples.

        ``step``: number of the micro-batch counted over the whole run. ``positions``: place of each sample in the global batch
        of that step, so that N processes with B samples draw what one process with N * B draws.
        """

    def validation_timesteps(self) -> tuple[int, ...]:
        """The fixed timesteps at which validation looks, in the family's own count of 1000."""

    def corrupt_at(self, latents: Tensor, noise: Tensor, timestep: int, *, dtype: torch.dtype = torch.float32) -> NoisyLatents:
        """Noise given and one of ``validation_timesteps`` for all samples."""

    def loss(self, prediction: Tensor, noisy: NoisyLatents, *, sample_weights: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of each sample (B,), float32. ``prediction`` (B, C, h, w), ``sample_weights`` (B,), ``mask`` (B, 1, h, w)."""

    def loss_settings(self) -> tuple[object, ...]:
        """The options that the loss at a given timestep depends on: under others it is another quantity."""


class FlowObjective:
    """Rectified flow. Holds options only; every number it draws is a function of the arguments of :meth:`corrupt`."""

    def __init__(self, flow: FlowOptions, noise: NoiseOptions, loss: LossOptions):
        if problems := list(loss.flow_problems()):
            raise OptionError(*problems)
        self.flow = flow
        self.noise = noise
        self.loss_options = loss

    def corrupt(self, latents: Tensor, *, seed: int, step: int, positions: Sequence[int],
                dtype: torch.dtype = torch.float32) -> NoisyLatents:  # fmt: skip
        draws = Draws(seed, step, positions, latents.device)
        sigmas = self._draw_sigmas(draws, latent_hw=(latents.shape[-2], latents.shape[-1]))
        noise = training_noise(latents, self.noise, draws)
        input_noise = model_input_noise(noise, self.noise, draws)
        return replace(self.corrupt_with(latents, noise, sigmas, input_noise=input_noise, dtype=dtype), draws=draws)

    def corrupt_with(self, latents: Tensor, noise: Tensor, sigmas: Tensor, *, input_noise: Tensor | None = None,
                     dtype: torch.dtype = torch.float32) -> NoisyLatents:  # fmt: skip
        """The same with given noise (B, C, h, w) and sigmas (B,).

        ``input_noise`` replaces the noise in the model's input, but not in the target.
        """
        latents, noise, sigmas = latents.float(), noise.float(), sigmas.float()
        mixed = torch.lerp(latents, noise if input_noise is None else input_noise.float(), sigmas.reshape(-1, 1, 1, 1))
        return NoisyLatents(
            latents=mixed.to(dtype),
            sigmas=sigmas,
            timesteps=sigmas * TIMESTEPS,
            target=noise - latents,
            loss_weights=flow_loss_weights(self.flow.loss_weighting, sigmas),
        )

    def validation_timesteps(self) -> tuple[int, ...]:
        """Timesteps in 0..1000, sigma * 1000."""
        return validation_timesteps(*self.flow.timestep_bounds)

    def corrupt_at(self, latents: Tensor, noise: Tensor, timestep: int, *, dtype: torch.dtype = torch.float32) -> NoisyLatents:
        sigmas = torch.full((latents.shape[0],), timestep / TIMESTEPS, device=latents.device)
        return self.corrupt_with(latents, noise, sigmas, dtype=dtype)

    def loss(self, prediction: Tensor, noisy: NoisyLatents, *, sample_weights: Tensor, mask: Tensor | None = None) -> Tensor:
        target = noisy.target
        if self.flow.judges_image:
            scale = image_scale(self.flow.loss_weighting, noisy.sigmas).reshape(-1, 1, 1, 1)
            prediction, target = scale * prediction.float(), scale * target
        loss = elementwise_loss(prediction, target, self.loss_options, timesteps=noisy.timesteps)
        return per_sample_mean(loss, mask) * noisy.loss_weights * sample_weights

    def loss_settings(self) -> tuple[object, ...]:
        return self.loss_options, self.flow.loss_weighting, self.flow.judges_image

    def _draw_sigmas(self, draws: Draws, latent_hw: tuple[int, int]) -> Tensor:
        raw = draws.normal("timestep") if sigma_sampler(self.flow).draw == "normal" else draws.uniform("timestep")
        return sample_sigmas(raw, self.flow, latent_hw=latent_hw)
