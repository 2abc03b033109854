"""How rectified-flow models draw and weigh the noise level of each image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import above_zero

TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
TIMESTEPS = 1000  # 0 = clean image, 1000 = pure noise


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowOptions:
    """Timesteps: how the noise level of each image is drawn, and how it weighs in the loss."""

    timestep_sampling: str = opt("sigmoid", "how noise levels are drawn", choices=TIMESTEP_SAMPLINGS)
    sigmoid_scale: float = opt(1.0, "spread of the sigmoid, shift and flux_shift samplings: more reaches both ends more often")
    discrete_flow_shift: float = opt(1.0, "moves the shift and sigma samplings towards more noise (1 = not at all)")
    weighting_scheme: str = opt(
        "uniform", "loss weight by noise level (sigma_sqrt, cosmap), or draw of the sigma sampling (logit_normal, mode)",
        choices=WEIGHTING_SCHEMES,
    )  # fmt: skip
    logit_mean: float = opt(0.0, "centre of --weighting_scheme=logit_normal (0 = the middle)")
    logit_std: float = opt(1.0, "spread of --weighting_scheme=logit_normal")
    mode_scale: float = opt(1.29, "strength of --weighting_scheme=mode (0 = uniform)")
    min_timestep: int | None = opt(None, "lowest timestep drawn, 0 to 999 (not set = 0, the clean image)")
    max_timestep: int | None = opt(None, "timesteps are drawn below this, 1 to 1000 (not set = 1000, pure noise)")

    @property
    def timestep_bounds(self) -> tuple[int, int]:
        """The lowest and the highest timestep that are trained."""
        return self.min_timestep or 0, TIMESTEPS if self.max_timestep is None else self.max_timestep

    def problems(self) -> Iterator[str]:
        yield from above_zero(self, "sigmoid_scale", "discrete_flow_shift", "logit_std")
        low, high = self.timestep_bounds
        for name, value in (("min_timestep", low), ("max_timestep", high)):
            if not 0 <= value <= TIMESTEPS:
                yield f"--{name} is {value}: give a timestep from 0 to {TIMESTEPS}"
        if low >= high:
            yield f"--min_timestep is {low}, not below --max_timestep, which is {high}: lower the first or raise the second"

    def warnings(self) -> Iterator[str]:
        if self.weighting_scheme in ("logit_normal", "mode") and self.timestep_sampling != "sigma":
            yield (
                f"--weighting_scheme={self.weighting_scheme} does nothing with --timestep_sampling={self.timestep_sampling}: "
                "it belongs to --timestep_sampling=sigma"
            )
