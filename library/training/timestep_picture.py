"""--show_timesteps: the noise levels that training would use, as a picture and as numbers.

Instead of random draws every sampling gets evenly spread quantiles of its distribution, so that the curves are smooth and the
same at every call.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.training.loss.ddpm import NoiseLevels
from library.training.loss.losses import flow_loss_weights, image_scale
from library.training.loss.timesteps import TABLE_STEPS, resolution_mu, sample_sigmas, sigma_sampler

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from library.options.ddpm import DdpmTrainingOptions
    from library.options.flow import FlowOptions

QUANTILES = 100_000
BINS = 100
TABLE_STEP = 1 / TABLE_STEPS
TOLD_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
PICTURE_WH, PLOT = (1200, 640), (90, 110, 1160, 540)  # pixels; the plot's left, top, right and bottom
LINE_CHARACTERS = 110
PAPER, INK, GRID, BARS, CURVE = "#ffffff", "#222222", "#e3e3e3", "#9dbfe8", "#c2410c"

Sizes = Mapping[tuple[int, int], float]  # latent (h, w) -> how often it is trained


@dataclass(frozen=True, slots=True)
class TimestepShares:
    """``drawn`` (BINS,) float64: share of the training images in each of the equal parts of [0, 1]; ``weighed`` (BINS,): share
    of the loss, were it the same at all noise levels. Both sum to 1. ``quantiles``: share -> timestep in [0, 1000].
    ``settings``: what makes them so, for people."""

    drawn: Tensor
    weighed: Tensor
    quantiles: dict[float, float]
    settings: str


def flow_shares(flow: FlowOptions, sizes: Sizes) -> TimestepShares:
    """How often each noise level is trained, over images of ``sizes``, and how much it counts in the loss."""
    middles = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    sampler = sigma_sampler(flow)
    draws = middles if sampler.draw == "uniform" else torch.special.ndtri(middles)
    share = 1 / sum(sizes.values()) / QUANTILES
    parts = [(sample_sigmas(draws, flow, latent_hw=size), times * share) for size, times in sizes.items()]
    sigmas = torch.cat([part for part, _ in parts])
    chances = torch.cat([torch.full_like(part, chance, dtype=torch.float64) for part, chance in parts])
    levels = sigmas.double() + TABLE_STEP if sampler.rounds_down else sigmas.double()  # as those of a table of noise levels
    return _shares(levels, chances, squared_error_weights(flow, sigmas).double(), _flow_settings(flow, sizes))


def squared_error_weights(flow: FlowOptions, sigmas: Tensor) -> Tensor:
    """How much the squared error of a velocity counts in the loss at each sigma (N,)."""
    weights = flow_loss_weights(flow.loss_weighting, sigmas)
    return weights * image_scale(flow.loss_weighting, sigmas) ** 2 if flow.judges_image else weights


def ddpm_shares(ddpm: DdpmTrainingOptions) -> TimestepShares:
    """The same for models with a table of noise levels."""
    timesteps = torch.tensor(ddpm.drawn)
    chances = torch.full(timesteps.shape, 1 / len(timesteps), dtype=torch.float64)
    weights = NoiseLevels.of(ddpm).loss_weights[timesteps].double()
    levels = (timesteps.double() + 1) / TABLE_STEPS  # "below 500" means all up to number 499
    return _shares(levels, chances, weights, _ddpm_settings(ddpm))


def _shares(levels: Tensor, chances: Tensor, weights: Tensor, settings: str) -> TimestepShares:
    """Of noise levels (N,) in [0, 1], how likely each is and how much it weighs."""
    places = ((levels - TABLE_STEP / 2) * BINS).long().clamp(0, BINS - 1)  # the table's levels lie on the bins' borders
    drawn, weighed = (torch.zeros(BINS, dtype=torch.float64).index_add_(0, places, part) for part in (chances, chances * weights))
    return TimestepShares(drawn, weighed / weighed.sum(), _quantiles(levels, chances), settings)


def _quantiles(levels: Tensor, chances: Tensor) -> dict[float, float]:
    order = levels.argsort()
    reached = chances[order].cumsum(0)
    places = [int(torch.searchsorted(reached, share).clamp_max(len(order) - 1)) for share in TOLD_SHARES]
    return {share: 1000 * float(levels[order[place]]) for share, place in zip(TOLD_SHARES, places, strict=True)}


def _ddpm_settings(ddpm: DdpmTrainingOptions) -> str:
    given = {option.name: getattr(ddpm, option.name) for option in fields(ddpm) if getattr(ddpm, option.name)}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    return " ".join(flags) or "all timesteps, each counting alike"


def _flow_settings(flow: FlowOptions, sizes: Sizes) -> str:
    """The settings that act, as flags."""
    parts = [f"--{name}={getattr(flow, name)}" for name in flow.acting]
    if flow.depends_on_sizes:
        shifts = [math.exp(resolution_mu(size)) for size in sizes]
        parts.append(f"(shift {min(shifts):.2f} to {max(shifts):.2f} by the sizes of the pictures)")
    return " ".join(parts)


def shares_lines(shares: TimestepShares) -> Iterator[str]:
    """The curves in words, for the console."""
    yield f"timesteps (0 = the picture, 1000 = noise) of {shares.settings}"
    told = ", ".join(f"{share:.0%} below {timestep:.0f}" for share, timestep in shares.quantiles.items())
    yield f"  drawn: {told}"
    for name, values in (("drawn", shares.drawn), ("of the loss", shares.weighed)):
        tenths = values.view(10, -1).sum(1).tolist()
        yield f"  by hundreds of timesteps, {name}: {' '.join(f'{tenth:.1%}' for tenth in tenths)}"


def draw_timesteps(shares: TimestepShares) -> Image:
    """Bars: how often a timestep is drawn; line: its share of the loss."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", PICTURE_WH, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(18)
    highest = 1.1 * float(torch.maximum(shares.drawn, shares.weighed).max())
    _draw_axes(draw, highest)
    left, top, right, bottom = PLOT
    step = (right - left) / BINS
    heights = [(bottom - top) * value / highest for value in shares.drawn.tolist()]
    for place, height in enumerate(heights):
        draw.rectangle((left + place * step, bottom - height, left + (place + 1) * step - 1, bottom), fill=BARS)
    draw.line(_points(shares.weighed.tolist(), highest), fill=CURVE, width=3)
    _write_legend(draw, shares.settings)
    return picture


def _points(values: Sequence[float], highest: float) -> list[tuple[float, float]]:
    left, top, right, bottom = PLOT
    step = (right - left) / BINS
    return [(left + (place + 0.5) * step, bottom - (bottom - top) * value / highest) for place, value in enumerate(values)]


def _draw_axes(draw: ImageDraw, highest: float) -> None:
    left, top, right, bottom = PLOT
    for tenth in range(11):
        x = left + (right - left) * tenth / 10
        draw.line((x, top, x, bottom), fill=GRID)
        draw.text((x, bottom + 8), str(100 * tenth), fill=INK, anchor="ma")
    for quarter in range(5):
        y = bottom - (bottom - top) * quarter / 4
        draw.line((left, y, right, y), fill=GRID)
        draw.text((left - 8, y), f"{highest * quarter / 4:.1%}", fill=INK, anchor="rm")
    draw.line((left, bottom, right, bottom), fill=INK)
    draw.text(((left + right) / 2, bottom + 40), "timestep: 0 = the picture, 1000 = noise", fill=INK, anchor="ma")


def _write_legend(draw: ImageDraw, settings: str) -> None:
    left = PLOT[0]
    draw.multiline_text((left, 8), textwrap.fill(settings, LINE_CHARACTERS), fill=INK)
    for row, (colour, text) in enumerate(
        ((BARS, "drawn, share per 10 timesteps"), (CURVE, "share of the loss, if it were level"))
    ):
        x = left + 420 * row
        draw.rectangle((x, 64, x + 26, 84), fill=colour)
        draw.text((x + 36, 64), text, fill=INK)
