"""The noise of a training step, and where its random numbers come from.

Every function is pure: tensors and random numbers in, tensors out. The options act for every model family. What the reference
draws once for a batch (random strengths, the sizes of multires noise) is drawn for each sample here, and what it measures over
a batch (the deviation of multires noise) is measured for each sample, so that a batch may be split over processes at will.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from library.randomness import python_random, torch_generator

if TYPE_CHECKING:
    from library.options.noise import NoiseOptions


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of one micro-batch: each sample's depend on (seed, step, its position in the global batch, purpose).

    ``step`` counts micro-batches over the whole run. Asking twice for one purpose gives the same numbers.
    """

    seed: int
    step: int
    positions: Sequence[int]
    device: torch.device | str = "cpu"

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """N(0, 1), (B, *shape) float32."""
        result = torch.empty((len(self.positions), *shape), device=self.device)
        for sample, position in enumerate(self.positions):
            result[sample].normal_(generator=self._generator(position, purpose))
        return result

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """U(0, 1), (B, *shape) float32."""
        result = torch.empty((len(self.positions), *shape), device=self.device)
        for sample, position in enumerate(self.positions):
            result[sample].uniform_(generator=self._generator(position, purpose))
        return result

    def host_uniform(self, sample: int, purpose: str) -> float:
        """U(0, 1) as a Python number, for choices that the host must know (tensor sizes)."""
        return python_random(self.seed, self.step, self.positions[sample], purpose).random()

    def sample(self, index: int) -> Draws:
        """The draws of one sample alone."""
        return Draws(self.seed, self.step, self.positions[index : index + 1], self.device)

    def _generator(self, position: int, purpose: str) -> torch.Generator:
        return torch_generator(self.seed, self.step, position, purpose, device=self.device)


def training_noise(latents: Tensor, options: NoiseOptions, draws: Draws) -> Tensor:
    """The noise that is mixed into latents (B, C, h, w) and that the target is made of. Float32, same shape."""
    noise = draws.normal("noise", *latents.shape[1:])
    if options.noise_offset:
        strength = offset_strength(latents, options, draws)
        noise = noise + strength * draws.normal("noise offset", latents.shape[1], 1, 1)
    if options.multires_noise_iterations:
        noise = multires_noise(noise, options, draws)
    return noise


def offset_strength(latents: Tensor, options: NoiseOptions, draws: Draws) -> Tensor | float:
    """How much of a constant is added to each channel: a number, (B, 1, 1, 1), or (B, C, 1, 1) when adaptive."""
    strength: Tensor | float = options.noise_offset or 0.0
    if options.noise_offset_random_strength:
        strength = strength * draws.uniform("noise offset strength", 1, 1, 1)
    if options.adaptive_noise_scale:
        channel_mean = latents.float().mean(dim=(2, 3), keepdim=True).abs()  # (B, C, 1, 1)
        strength = (strength + options.adaptive_noise_scale * channel_mean).clamp_min(0)
    return strength


def multires_noise(noise: Tensor, options: NoiseOptions, draws: Draws) -> Tensor:
    """Adds noise of ever lower resolution to noise (B, C, h, w); each sample is scaled to deviation 1 at the end."""
    samples = [_multires_sample(noise[index : index + 1], options, draws.sample(index)) for index in range(len(noise))]
    return torch.cat(samples)


def _multires_sample(noise: Tensor, options: NoiseOptions, draws: Draws) -> Tensor:
    layers = []  # noise (1, C, h, w)
    for level in range(options.multires_noise_iterations or 0):
        size_hw = layer_size_hw(noise.shape[-2:], level, draws.host_uniform(0, f"multires size {level}"))
        layers.append(draws.normal(f"multires noise {level}", noise.shape[1], *size_hw))  # (1, C, h', w')
        if 1 in size_hw:
            break  # nothing coarser is left
    return with_coarse_layers(noise, layers, options.multires_noise_discount)


def layer_size_hw(size_hw: Sequence[int], level: int, draw: float) -> tuple[int, int]:
    """Height and width of layer number ``level``: 2 to 4 times smaller per level, by a draw from U(0, 1)."""
    ratio = (2 + 2 * draw) ** level
    height, width = (max(1, int(side / ratio)) for side in size_hw)
    return height, width


def with_coarse_layers(noise: Tensor, layers: Sequence[Tensor], discount: float) -> Tensor:
    """noise (B, C, h, w) + layers (B, C, h', w') made as large, each weaker by ``discount``; scaled to deviation 1 as a whole."""
    total = noise
    for level, layer in enumerate(layers):
        total = total + F.interpolate(layer, size=noise.shape[-2:], mode="bilinear") * discount**level
    return total / total.std()


def model_input_noise(noise: Tensor, options: NoiseOptions, draws: Draws) -> Tensor | None:
    """The noise that only the model's input gets (input perturbation, arXiv 2301.11706); None when it is the target's."""
    if not options.ip_noise_gamma:
        return None
    gamma: Tensor | float = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        gamma = gamma * draws.uniform("input noise strength", 1, 1, 1)
    return perturbed_noise(noise, draws.normal("input noise", *noise.shape[1:]), gamma)


def perturbed_noise(noise: Tensor, perturbation: Tensor, gamma: Tensor | float) -> Tensor:
    """noise + gamma * perturbation; gamma a number or (B, 1, 1, 1)."""
    return noise + gamma * perturbation
