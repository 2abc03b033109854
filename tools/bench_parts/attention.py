"""What a training step gains when the zero rows behind a caption are left out of cross-attention, against computing with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from library.anima.denoiser import CONTEXT_ROWS, AnimaDenoiser
from library.anima.layout import DenoiserConfig
from networks import lora_anima
from tools.bench_parts.figures import Figure, alternate, stopwatch

GAIN = 1.02  # target: below it the plain form would be the better one, being simpler
LARGEST_DIFFERENCE = 1e-5  # between the forms' velocities in float32, relative to the largest
RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Captions of so many T5 tokens make the batch; a latent side of 64 is 1024 image tokens."""

    tokens: tuple[int, ...]
    side: int

    @property
    def title(self) -> str:
        captions = "+".join(map(str, self.tokens))
        return f"{(self.side // 2) ** 2} image tokens, captions of {captions}"


CASES = (
    Case(tokens=(60,), side=64),
    Case(tokens=(60, 25), side=64),
    Case(tokens=(200,), side=64),
    Case(tokens=(60,), side=128),
)
ONE_BLOCK = DenoiserConfig(blocks=1, adapter=None)  # of the published width; 28 would take minutes a step


def measure(repeats: int, *, cases: Sequence[Case] = CASES, config: DenoiserConfig = ONE_BLOCK) -> list[Figure]:
    """Float32 on the CPU; forward, and backward into a LoRA of rank 16 on all default modules."""
    return [figure for case in cases for figure in zero_rows(case, repeats, config)]


def zero_rows(case: Case, repeats: int, config: DenoiserConfig) -> list[Figure]:
    step = training_step(case, config)
    whole, short = step(None), step(max(case.tokens))
    difference = (whole - short).abs().max() / whole.abs().max()
    plain, cut = stopwatch(lambda: step(None)), stopwatch(lambda: step(max(case.tokens)))
    pairs = alternate(plain, cut, repeats=repeats, warm_up=False)
    name = f"zero rows, {case.title}"
    how = pairs.described("with them", "without")
    return [
        Figure(name=f"{name}: with / without", value=pairs.ratio, unit="x", at_least=GAIN, how=how),
        Figure(name=f"{name}: difference", value=difference.item(), unit="", at_most=LARGEST_DIFFERENCE, how="of the velocity"),
    ]


def training_step(case: Case, config: DenoiserConfig) -> Callable[[int | None], torch.Tensor]:
    """Forward and backward, given the ``used_rows`` of the denoiser; returns the velocity."""
    torch.manual_seed(0)
    denoiser = AnimaDenoiser(config).requires_grad_(False)
    network = lora_anima.create_network(1.0, RANK, float(RANK), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    images = len(case.tokens)
    latents, sigmas = torch.randn(images, config.in_channels, case.side, case.side), torch.rand(images)
    context = torch.zeros(images, CONTEXT_ROWS, config.context_dim)
    for rows, tokens in zip(context, case.tokens, strict=True):
        rows[:tokens].normal_()
    gradient = torch.randn_like(latents)

    def step(used_rows: int | None) -> torch.Tensor:
        network.zero_grad(set_to_none=False)
        velocity = denoiser(latents, sigmas, context, used_rows=used_rows)
        velocity.backward(gradient)
        return velocity.detach()

    return step
