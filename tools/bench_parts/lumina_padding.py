"""What captions of unlike lengths cost Lumina: a batch's training step against the steps of its samples alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from library.lumina.denoiser import NextDit
from library.lumina.layout import NextDitConfig
from networks import lora_lumina
from tools.bench_parts.figures import Figure, alternate, stopwatch

MOST = 1.10  # target: a batch costs at most its valid tokens and a tenth
RANK = 16
# A third of the published width, and few blocks: a step of the real one takes minutes on a CPU.
SMALL = NextDitConfig(
    width=768, heads=8, kv_heads=4, mlp_hidden=3072, context_width=768, blocks=2, context_refiners=1, noise_refiners=1
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Captions of so many tokens make the batch; a latent side of 64 is 1024 image tokens."""

    lengths: tuple[int, ...]
    side: int

    @property
    def title(self) -> str:
        return f"{(self.side // 2) ** 2} image tokens, captions of {'+'.join(map(str, self.lengths))}"


CASES = (
    Case(lengths=(40, 250), side=64),
    Case(lengths=(30, 40, 50, 250), side=32),
)


def measure(repeats: int, *, cases: Sequence[Case] = CASES, config: NextDitConfig = SMALL) -> list[Figure]:
    """Float32 on the CPU; forward, and backward into a LoRA of rank 16 on all default modules."""
    return [figure for case in cases for figure in padding(case, repeats, config)]


def padding(case: Case, repeats: int, config: NextDitConfig) -> list[Figure]:
    """In a row without padding, as training does it, and padded and masked, as it does under torch.compile."""
    steps = training_steps(case, config)
    figures = []
    for packs, name, limit in ((True, "in a row", MOST), (False, "padded", None)):
        pairs = alternate(stopwatch(lambda: steps(packs)), stopwatch(lambda: steps(None)), repeats=repeats)  # noqa: B023
        how = pairs.described("the batch", "its samples alone")
        figures.append(Figure(name=f"Lumina, {case.title}, {name}", value=pairs.ratio, unit="x", at_most=limit, how=how))
    return figures


def training_steps(case: Case, config: NextDitConfig) -> Callable[[bool | None], None]:
    """Forward and backward of the batch with ``packs`` as given, or of its samples one after the other (None)."""
    torch.manual_seed(0)
    denoiser = NextDit(config).requires_grad_(False)
    network = lora_lumina.create_network(1.0, RANK, float(RANK), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    images = len(case.lengths)
    latents, times = torch.randn(images, config.in_channels, case.side, case.side), torch.rand(images)
    states = torch.randn(images, max(case.lengths), config.context_width)
    gradient = torch.randn_like(latents)

    def step(packs: bool | None) -> None:
        network.zero_grad(set_to_none=False)
        batches = [slice(None)] if packs is not None else [slice(number, number + 1) for number in range(images)]
        for rows in batches:
            denoiser.packs = bool(packs)
            velocity = denoiser(latents[rows], times[rows], states[rows], case.lengths[rows])
            velocity.backward(gradient[rows])

    return step
