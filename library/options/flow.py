"""How rectified-flow models draw and weigh the noise level of each image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from library.options.declare import opt
from library.options.rules import above_zero

TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
LUMINA_TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift")
SIZED_SAMPLINGS = ("nextdit_shift", "flux_shift")  # those whose shift depends on the sizes of the pictures
WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
DRAWING_SCHEMES = {"logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}  # scheme -> the options it reads
LOSS_SCHEMES = ("sigma_sqrt", "cosmap")
PREDICTION_TYPES = ("raw", "additive", "sigma_scaled")
SHAPING = ("sigmoid_scale", "discrete_flow_shift", "logit_mean", "logit_std", "mode_scale")  # some draws read them, others not
TIMESTEPS = 1000  # 0 = clean image, 1000 = pure noise


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowOptions:
    """Timesteps: what all flow models have in common."""

    weighting_scheme: str = opt(
        "uniform", "loss weight by noise level (sigma_sqrt, cosmap), or draw of the noise levels (logit_normal, mode)",
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

    @property
    def depends_on_sizes(self) -> bool:
        """Whether what is drawn depends on the sizes of the pictures."""
        return False

    @property
    def judges_image(self) -> bool:
        """Whether the loss compares guesses of the image, ``x_t - sigma * velocity``, instead of velocities."""
        return False

    @property
    def loss_weighting(self) -> str:
        """The weighting scheme that the loss follows."""
        return self.weighting_scheme

    @property
    def acting(self) -> tuple[str, ...]:
        """The options that shape how often a noise level is trained and how much it counts, most telling first."""
        return ("weighting_scheme", *DRAWING_SCHEMES.get(self.weighting_scheme, ()), *self._given_bounds)

    @property
    def scheme_draws(self) -> bool:
        """Whether --weighting_scheme decides which noise levels are drawn."""
        return self.weighting_scheme in DRAWING_SCHEMES

    @property
    def objective(self) -> str:
        """What the loss compares, and at which noise levels: for the plan."""
        told = ("min_timestep", "max_timestep", "model_prediction_type", *(() if self.scheme_draws else ("weighting_scheme",)))
        names = [name for name in self.acting if name not in told]
        drawn = [f"{name}={getattr(self, name)}" for name in names]
        if not {"weighting_scheme", "timestep_sampling"}.intersection(names):
            drawn.insert(0, "evenly")
        by = "" if drawn[0] == "evenly" else "by "
        compared = "guesses of the image" if self.judges_image else "velocities"
        low, high = self.timestep_bounds
        weighted = f"; weighted by {self.loss_weighting}" if self.loss_weighting in LOSS_SCHEMES else ""
        return f"the loss compares {compared}; noise levels are drawn {by}{', '.join(drawn)}, timesteps {low} to {high}{weighted}"

    @property
    def _given_bounds(self) -> tuple[str, ...]:
        return tuple(name for name in ("min_timestep", "max_timestep") if getattr(self, name) is not None)

    def problems(self) -> Iterator[str]:
        yield from above_zero(self, "logit_std")
        low, high = self.timestep_bounds
        for name, value in (("min_timestep", low), ("max_timestep", high)):
            if not 0 <= value <= TIMESTEPS:
                yield f"--{name} is {value}: give a timestep from 0 to {TIMESTEPS}"
        if low >= high:
            yield f"--min_timestep is {low}, not below --max_timestep, which is {high}: lower the first or raise the second"

    def warnings(self) -> Iterator[str]:
        if idle := list(self._idle):
            named = ", ".join(f"--{name}={getattr(self, name):g}" for name in idle)
            draws = [name for name in ("timestep_sampling", "weighting_scheme") if hasattr(self, name)]
            by = " and ".join(f"--{name}={getattr(self, name)}" for name in draws)
            words = ("do", "them") if len(idle) > 1 else ("does", "it")
            yield f"{named} {words[0]} nothing with {by}: noise levels are drawn without {words[1]}"

    @property
    def _idle(self) -> Iterator[str]:
        """The options that are changed and do not act. Those of the weighting scheme do where it does."""
        acting = (*self.acting, *DRAWING_SCHEMES.get(self.weighting_scheme, ()))
        for option in fields(self):
            if option.name in SHAPING and option.name not in acting and getattr(self, option.name) != option.default:
                yield option.name


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledFlowOptions(FlowOptions):
    """Timesteps: of models with a choice of samplings."""

    timestep_sampling: str = opt("sigmoid", "how noise levels are drawn", choices=TIMESTEP_SAMPLINGS)
    sigmoid_scale: float = opt(1.0, "spread of the sigmoid, shift and flux_shift samplings: more reaches both ends more often")
    discrete_flow_shift: float = opt(1.0, "moves the shift and sigma samplings towards more noise (1 = not at all)")
    weighting_scheme: str = opt(
        "uniform", "loss weight by noise level (sigma_sqrt, cosmap), or draw of the sigma sampling (logit_normal, mode)",
        choices=WEIGHTING_SCHEMES,
    )  # fmt: skip

    @property
    def depends_on_sizes(self) -> bool:
        return self.timestep_sampling in SIZED_SAMPLINGS

    @property
    def scheme_draws(self) -> bool:
        return self.timestep_sampling == "sigma" and self.weighting_scheme in DRAWING_SCHEMES

    @property
    def acting(self) -> tuple[str, ...]:
        of_sampling = {
            "sigmoid": ("sigmoid_scale",),
            "shift": ("sigmoid_scale", "discrete_flow_shift"),
            "sigma": ("discrete_flow_shift",),
            "flux_shift": ("sigmoid_scale",),
        }.get(self.timestep_sampling, ())
        of_scheme = DRAWING_SCHEMES.get(self.weighting_scheme, ()) if self.timestep_sampling == "sigma" else ()
        return ("timestep_sampling", *of_sampling, "weighting_scheme", *of_scheme, *self._given_bounds)

    def problems(self) -> Iterator[str]:
        yield from above_zero(self, "sigmoid_scale", "discrete_flow_shift")
        yield from FlowOptions.problems(self)

    def warnings(self) -> Iterator[str]:
        if self.weighting_scheme in DRAWING_SCHEMES and self.timestep_sampling != "sigma":
            yield (
                f"--weighting_scheme={self.weighting_scheme} does nothing with --timestep_sampling={self.timestep_sampling}: "
                "it belongs to --timestep_sampling=sigma"
            )
        yield from FlowOptions.warnings(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaFlowOptions(SampledFlowOptions):
    """Timesteps: how the noise level of each image is drawn, and how it weighs in the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3FlowOptions(FlowOptions):
    """Timesteps: how the noise level of each image is drawn, and how it weighs in the loss."""

    training_shift: float = opt(1.0, "moves what is drawn towards more noise (1 = not at all)")

    @property
    def judges_image(self) -> bool:
        return True

    @property
    def acting(self) -> tuple[str, ...]:
        return ("training_shift", *FlowOptions.acting.fget(self))  # type: ignore[attr-defined]

    def problems(self) -> Iterator[str]:
        yield from above_zero(self, "training_shift")
        yield from FlowOptions.problems(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaFlowOptions(SampledFlowOptions):
    """Timesteps: how the noise level of each image is drawn, and how it weighs in the loss."""

    timestep_sampling: str = opt("shift", "how noise levels are drawn", choices=LUMINA_TIMESTEP_SAMPLINGS)
    discrete_flow_shift: float = opt(6.0, "moves the shift and sigma samplings towards more noise (1 = not at all)")
    weighting_scheme: str = opt(
        "uniform", "loss weight of sigma_scaled predictions by noise level (sigma_sqrt, cosmap), or draw of the sigma sampling "
        "(logit_normal, mode)", choices=WEIGHTING_SCHEMES,
    )  # fmt: skip
    model_prediction_type: str = opt(
        "raw", "what the loss compares: raw = velocities, sigma_scaled = guesses of the image, which low noise changes less; "
        "additive = as raw", choices=PREDICTION_TYPES,
    )  # fmt: skip

    @property
    def judges_image(self) -> bool:
        return self.model_prediction_type == "sigma_scaled"

    @property
    def loss_weighting(self) -> str:
        return self.weighting_scheme if self.judges_image else "none"

    @property
    def acting(self) -> tuple[str, ...]:
        names = SampledFlowOptions.acting.fget(self)  # type: ignore[attr-defined]
        return (*names, "model_prediction_type")

    def warnings(self) -> Iterator[str]:
        yield from SampledFlowOptions.warnings(self)
        if self.model_prediction_type == "additive":
            yield (
                "--model_prediction_type=additive trains as raw does: the noisy latents are added to the prediction and to what "
                "it is compared with, so their difference stays the same"
            )
        if self.weighting_scheme in LOSS_SCHEMES and not self.judges_image:
            yield (
                f"--weighting_scheme={self.weighting_scheme} does nothing with "
                f"--model_prediction_type={self.model_prediction_type}: it belongs to --model_prediction_type=sigma_scaled"
            )
