"""Pictures with every setting decided, drawn by a rectified-flow model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.nn.initial_noise import initial_noises
from library.sampling.flow_samplers import FlowSettings, Predict, draw_flow
from library.sampling.picture_plan import Picture


def draw_pictures(  # noqa: PLR0913  # what pictures need
    predict: Predict,
    pictures: Sequence[Picture],
    positive: Any,
    negative: Any | None,
    *,
    channels: int,
    schedule: str,
    device: torch.device,
) -> Tensor:
    """Scaled latents (B, channels, h, w) of pictures that differ in texts and seeds alone.

    ``positive``, ``negative``: the texts of all, as ``predict`` takes them; None = without guidance.
    """
    first, seeds = pictures[0], [picture.seed for picture in pictures]
    return draw_flow(
        predict,
        initial_noises(seeds, (first.width, first.height), channels).to(device),
        positive=positive,
        negative=negative,
        settings=FlowSettings(
            steps=first.steps,
            shift=first.flow_shift,
            scale=first.scale,
            sampler=first.sampler,
            schedule=schedule,
            cfg_trunc_ratio=first.cfg_trunc_ratio,
            renorm_cfg=first.renorm_cfg,
        ),
        seeds=seeds,
    )
