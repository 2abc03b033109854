"""What only models with a table of noise levels (DDPM: Stable Diffusion 1, 2 and XL) have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.options.declare import opt
from library.options.rules import at_least

TIMESTEPS = 1000  # levels in the table: 0 = nearly the clean image, 999 = nearly pure noise


@dataclass(frozen=True, slots=True, kw_only=True)
class DdpmOptions:
    """Stable Diffusion's noise: targets and loss weights of models with a table of noise levels."""

    v_parameterization: bool = opt(False, "the model predicts velocity (v) instead of noise")
    zero_terminal_snr: bool = opt(False, "change the table of noise levels so that its last one is pure noise")
    min_snr_gamma: float | None = opt(None, "weigh low noise less: min-SNR with this gamma, often 5 (not set or 0 = all alike)")
    scale_v_pred_loss_like_noise_pred: bool = opt(False, "weigh the loss of velocity as that of noise")
    v_pred_like_loss: float | None = opt(None, "add this times a velocity-like loss (not set or 0 = nothing)")
    debiased_estimation_loss: bool = opt(
        False, "weigh low noise less: the loss by 1 / sqrt(SNR), or by 1 / (SNR + 1) with --v_parameterization"
    )

    @property
    def objective(self) -> str:
        """What the model is trained to predict, for the plan."""
        return "velocity (v)" if self.v_parameterization else "noise prediction (epsilon)"

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "min_snr_gamma", "v_pred_like_loss")
        if self.scale_v_pred_loss_like_noise_pred and not self.v_parameterization:
            yield (
                "--scale_v_pred_loss_like_noise_pred needs --v_parameterization, whose loss it weighs: give that too if the "
                "model predicts velocity, else drop it"
            )
        if self.v_pred_like_loss and self.v_parameterization:
            yield (
                f"--v_pred_like_loss={self.v_pred_like_loss:g} cannot be combined with --v_parameterization, whose loss is that "
                "of velocity already: drop it"
            )

    def warnings(self) -> Iterator[str]:
        if self.zero_terminal_snr and not self.v_parameterization:
            yield (
                "--zero_terminal_snr without --v_parameterization: at the last timestep the model sees noise alone, and to tell "
                "the noise teaches nothing there; it is meant for models that predict velocity"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DdpmTrainingOptions(DdpmOptions):
    """Noise levels: which are drawn, what the model predicts at them, and how much each counts in the loss."""

    min_timestep: int | None = opt(None, "lowest timestep drawn, 0 to 999 (not set = 0, the least noise)")
    max_timestep: int | None = opt(
        None, "timesteps are drawn below this, 0 to 1000 (not set = 1000); if not above --min_timestep: always this one"
    )

    @property
    def drawn(self) -> range:
        """The timesteps that training draws, all alike."""
        low, high = self._bounds
        return range(low, high) if low < high else range(high, high + 1)

    @property
    def objective(self) -> str:
        weighing = ("zero_terminal_snr", "min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss",
                    "debiased_estimation_loss")  # fmt: skip
        given = [name if value is True else f"{name}={value:g}" for name in weighing if (value := getattr(self, name))]
        drawn = f"; timesteps {self.drawn.start} to {self.drawn.stop - 1} are drawn evenly"
        return f"{DdpmOptions.objective.fget(self)}{drawn}{', ' if given else ''}{', '.join(given)}"  # type: ignore[attr-defined]

    @property
    def timestep_bounds(self) -> tuple[int, int]:
        """The lowest timestep that is drawn, and what all lie below."""
        return self.drawn.start, self.drawn.stop

    @property
    def _bounds(self) -> tuple[int, int]:
        return self.min_timestep or 0, TIMESTEPS if self.max_timestep is None else self.max_timestep

    def problems(self) -> Iterator[str]:
        yield from DdpmOptions.problems(self)
        low, high = self._bounds
        if not 0 <= low < TIMESTEPS:
            yield f"--min_timestep is {low}: give a timestep from 0 to {TIMESTEPS - 1}, which is the noisiest"
        if not 0 <= high <= TIMESTEPS:
            yield f"--max_timestep is {high}: give 0 to {TIMESTEPS}; timesteps are drawn below it"

    def warnings(self) -> Iterator[str]:
        yield from DdpmOptions.warnings(self)
        low, high = self._bounds
        if low > high:
            yield f"--min_timestep is {low}, above --max_timestep, which is {high}: every image is trained at timestep {high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOptions:
    """Stable Diffusion's text: its CLIP encoders and tokenizers."""

    CHANGES_TRAINING: ClassVar[tuple[str, ...]] = ()  # of the options: a resumed run should keep these

    v2: bool = opt(False, "the checkpoint is Stable Diffusion 2.x")
    clip_skip: int | None = opt(None, "use the N-th layer of CLIP counted from the end (not set = the last)")
    max_token_length: int | None = opt(None, "CLIP tokens of a caption that count (not set = 75)", choices=(150, 225))
    weighted_captions: bool = opt(False, "read (text:1.2) in captions as a weight")
    tokenizer_cache_dir: str | None = opt(
        None, "folder for downloaded tokenizers; not used, as they come with the project (not set = none)", path=True
    )

    def problems(self) -> Iterator[str]:
        return iter(())
