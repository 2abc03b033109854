"""Sampling along recorded trajectories of a flow model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from library.sampling.flow_samplers import FlowSettings, Predict, draw_flow


@dataclass
class Watched:
    """A model's velocity that remembers where it was asked with the positive text, and how often with the other."""

    predict: Predict
    positive: Any
    latents: list[torch.Tensor] = field(default_factory=list)
    sigmas: list[torch.Tensor] = field(default_factory=list)
    others: int = 0

    def __call__(self, latents: torch.Tensor, sigmas: torch.Tensor, text: Any) -> torch.Tensor:
        if text is self.positive:
            self.latents.append(latents)
            self.sigmas.append(sigmas[0])
        else:
            self.others += 1
        return self.predict(latents, sigmas, text)

    def draw(self, noise: torch.Tensor, negative: Any, settings: FlowSettings) -> torch.Tensor:
        with torch.no_grad():
            return draw_flow(self, noise, positive=self.positive, negative=negative, settings=settings, seeds=[0] * len(noise))


def recorded_velocity(path: Sequence[torch.Tensor], sigmas: torch.Tensor) -> Predict:
    """The velocity of each step from point to point of a recorded path (steps + 1 points), in that order."""

    def steps() -> Iterator[torch.Tensor]:
        levels = sigmas.double()
        for number in range(len(path) - 1):
            yield ((path[number + 1].double() - path[number].double()) / (levels[number + 1] - levels[number])).float()

    left = steps()
    return lambda latents, sigmas, text: next(left)
