"""Validation: the loss on images that are not trained, always at the same timesteps and with the same noise.

:class:`FixedLosses` measures; :class:`Validation` knows when, remembers the best, and tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.dataset.batch import Batch
from library.dataset.captions import caption_variant
from library.options.ddpm import DdpmOptions
from library.options.declare import options_of
from library.randomness import derive_seed, torch_generator
from library.training.files.state import base_model_fingerprint
from library.training.loss.objective import NoisyLatents, Objective
from library.training.preflight import CheckedRun
from library.training.running.processes import HostGroup
from library.training.steps import Progress
from library.training.validating.validated_images import differences, validation_marks
from library.training.validating.validation_plan import ValidationRecord, ValidationSchedule

if TYPE_CHECKING:
    from library.dataset.loader import ValidationBatches

logger = logging.getLogger(__name__)

Losses = list[Tensor]  # of each batch: (T, B) float64 on the CPU, T timesteps
Bar = Callable[[str, int], AbstractContextManager[Callable[[], object]]]  # (what, how many) -> a progress bar's step
FULL, OFF = 1.0, 0.0  # strength of the network
# of a state's history: what may be the reason that losses cannot be compared, to be named
REASONS = (
    *("--loss_type", "--huber_c", "--huber_scale", "--huber_schedule", "--weighting_scheme"),
    *(f"--{option.name}" for option in options_of(DdpmOptions)),
    "the base model's fingerprint",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over all images, by timestep."""

    by_timestep: dict[int, float]

    @property
    def mean(self) -> float:
        return sum(self.by_timestep.values()) / len(self.by_timestep)


@dataclass(frozen=True, kw_only=True)
class FixedLosses:
    """The same images, timesteps and noise at every call; nothing depends on batch sizes, processes or the device.

    Each process takes every ``processes``-th batch; all get the same result. ``ready`` is entered meanwhile (dropout off),
    ``prepare`` brings a batch to the device with latents and text, ``compute_loss`` gives the loss of each image (B,).
    """

    batches: ValidationBatches
    objective: Objective
    seed: int
    prepare: Callable[[Batch], Batch]
    compute_loss: Callable[[Batch, NoisyLatents], Tensor]
    dtype: torch.dtype  # of what the denoiser gets
    rank: int
    group: HostGroup
    workers: int  # threads that read and decode
    ready: Callable[[], AbstractContextManager[None]]
    stop_wanted: Callable[[], bool]  # asked before every prediction: a signal does not wait for all of them

    def measure(self, strength: float, bar: Bar) -> Measured | None:
        """None: some process was told to stop, and all give up."""
        with self.ready(), torch.no_grad():
            shares = self.group.gather(self._share(strength, bar))
        whole = [share for share in shares if share is not None]
        if len(whole) < len(shares):
            return None
        in_order = [whole[number % len(whole)][number // len(whole)] for number in range(len(self.batches))]
        means = torch.cat(in_order, dim=1).mean(dim=1).tolist()  # (T, images) -> T
        return Measured(dict(zip(self.objective.validation_timesteps(), means, strict=True)))

    def _share(self, strength: float, bar: Bar) -> Losses | None:
        processes = self.group.processes
        total = len(range(self.rank, len(self.batches), processes))
        batches = self.batches.batches(workers=self.workers, rank=self.rank, processes=processes)
        losses: Losses = []
        with batches, bar("validation", total) as advance:
            for batch in batches:
                of_batch = self._losses_of(batch, strength)
                if of_batch is None:
                    return None
                losses.append(of_batch)
                advance()
        return losses

    def _losses_of(self, batch: Batch, strength: float) -> Tensor | None:
        """(T, B): all images count alike and have their own target, with the network at ``strength`` whatever their dataset
        says."""
        plain = replace(batch, loss_weights=torch.ones_like(batch.loss_weights), custom_attributes=({},) * len(batch.item_keys))
        batch = self.prepare(replace(plain, network_multiplier=strength))
        assert batch.latents is not None
        noise = self._noise(batch.item_keys, batch.latents)
        rows: list[Tensor] = []
        for timestep in self.objective.validation_timesteps():
            if self.stop_wanted():
                return None
            noisy = self.objective.corrupt_at(batch.latents, noise, timestep, dtype=self.dtype)
            rows.append(self.compute_loss(batch, noisy))
        return torch.stack(rows).cpu().double()

    def _noise(self, keys: Sequence[str], latents: Tensor) -> Tensor:
        """(B, C, h, w) drawn for each image on the CPU, so that it is the same on every device."""
        generators = [torch_generator("validation noise", self.seed, key) for key in keys]
        noise = [torch.randn(latents.shape[1:], generator=generator) for generator in generators]
        return torch.stack(noise).to(latents.device)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one validation. ``given_up``: some process was told to stop, so that all of them stop. ``displaced_step``: of the best
    LoRA file so far, where it is to be kept because its loss cannot be compared with this one."""

    given_up: bool = False
    is_best: bool = False
    displaced_step: int | None = None


class Validation:
    """When a run validates, what came out, and the best of it. ``log`` takes curves and the step."""

    def __init__(self, run: CheckedRun, losses: FixedLosses, *, bar: Bar, log: Callable[[dict[str, float], int], None]):
        self._run, self._losses, self._bar, self._log = run, losses, bar, log
        self._schedule = ValidationSchedule.of(run.options.validation)
        self._has_images = len(losses.batches) > 0
        self.record = self._first_record()

    def is_due(self, progress: Progress) -> bool:
        """Whether a validation belongs after this step and has not been made; also asked when a run goes on from a state."""
        return self._has_images and bool(self._kinds(progress)) and self.record.finished_step != progress.step

    def measure_base_model(self, step: int, *, can_switch_off: bool) -> Outcome:
        """Once in a run: the base model's own loss, the line that a network should stay below.

        A network that cannot be switched off stands for the base model itself while it is new.
        """
        if not self._has_images or self.record.baseline is not None:
            return Outcome()
        is_new = step == 0 and self._run.resumed is None and not self._run.options.network.network_weights
        if not can_switch_off and not is_new:
            logger.info("validation: this network cannot be switched off, so the base model's own loss is not known")
            return Outcome()
        measured = self._losses.measure(OFF if can_switch_off else FULL, self._bar)
        if measured is None:
            return Outcome(given_up=True)
        if not math.isfinite(measured.mean):
            logger.warning("validation: the base model's own loss is not finite (%s)", measured.mean)
            return Outcome()
        self.record = replace(self.record, baseline=measured.mean)
        self._log({"loss/validation/baseline": measured.mean}, step)
        logger.info("validation of the base model: %.4f", measured.mean)
        return Outcome()

    def validate(self, progress: Progress, *, training_average: float) -> Outcome:
        """The network as it is. ``training_average``: the shown mean of the training loss, nan where there is none."""
        measured = self._losses.measure(FULL, self._bar)
        if measured is None:
            logger.info(
                "the validation after step %d was given up; a run that goes on from its state makes it first", progress.step
            )
            return Outcome(given_up=True)
        before = self.record
        is_best = math.isfinite(measured.mean) and (before.best is None or measured.mean < before.best)
        displaced = before.displaced_step if is_best and self._run.options.validation.save_best else None
        self.record = replace(before, finished_step=progress.step)
        if is_best:
            self.record = replace(self.record, best=measured.mean, best_step=progress.step)
        if displaced is not None:
            self.record = replace(self.record, displaced_step=None)
        self._log(self._curves(measured, self._kinds(progress), training_average), progress.step)
        self._tell(measured.mean, progress.step, before)
        return Outcome(is_best=is_best, displaced_step=displaced)

    def notes(self) -> dict[str, str]:
        """Metadata of the best LoRA file."""
        values = {"ss_validation_loss": self.record.best, "ss_validation_baseline": self.record.baseline}
        return {key: str(value) for key, value in values.items() if value is not None}

    def _kinds(self, progress: Progress) -> tuple[str, ...]:
        return self._schedule.due(progress, self._run.length)

    def _first_record(self) -> ValidationRecord:
        """That of the state the run goes on from; what it says of other images, noise, losses or models does not count."""
        resumed, start = self._run.resumed, self._run.start
        new = ValidationRecord(measured=self._what_is_measured(), images=validation_marks(self._run.training_set))
        if resumed is None:
            return replace(new, finished_step=start.step)
        saved = resumed.validation
        if start != resumed.progress:  # --initial_step: what the state owes belongs to another step
            saved = replace(saved, finished_step=start.step)
        if saved.measured == new.measured:
            return self._without_lost_best(replace(saved, images=new.images))
        if saved.best is not None:
            self._tell_that_the_best_does_not_count(saved, new)
        return replace(new, finished_step=saved.finished_step, displaced_step=saved.file_step)

    def _tell_that_the_best_does_not_count(self, saved: ValidationRecord, new: ValidationRecord) -> None:
        before = self._run.resumed.history if self._run.resumed is not None else {}
        now = self._run.settings.history
        changed = [name for name in REASONS if before.get(name) != now.get(name)]
        reasons = [differences(saved.images, new.images), f"other {', '.join(changed)}" if changed else ""]
        why = (
            "; ".join(filter(None, reasons))
            or "images, captions, sizes, masks, noise, VAE or text encoder are not those of the state"
        )
        logger.warning(
            "validation: the best loss of the state (%.4f at step %s) does not count: %s", saved.best, saved.best_step, why
        )
        if self._run.options.validation.save_best and saved.file_step is not None:
            best, kept = self._run.names.best_file().name, self._run.names.old_best_file(saved.file_step).name
            logger.warning("validation: with the first new best, %s of step %s is renamed to %s", best, saved.file_step, kept)

    def _without_lost_best(self, saved: ValidationRecord) -> ValidationRecord:
        """A best that no file holds is none: --save_best is new, or the run has another name."""
        file = self._run.names.best_file()
        is_there = file.exists() and saved.displaced_step is None
        if not self._run.options.validation.save_best or saved.best is None or is_there:
            return saved
        logger.info("validation: there is no %s, so the best loss is looked for from here on", file)
        return replace(saved, best=None, best_step=None)

    def _what_is_measured(self) -> str:
        """A digest of the images, the noise and what a loss means; of nothing that only says how it is computed."""
        if not self._has_images:
            return ""
        losses = self._losses
        images = [
            (item.key, item.bucket_wh, caption_variant(item, 0), item.is_masked, dict(item.custom_attributes))
            for item in sorted(losses.batches.items, key=lambda item: item.key)
        ]
        facts = (images, losses.seed, losses.objective.validation_timesteps(), self._meaning())
        return f"{derive_seed('what is measured', repr(facts)):016x}"

    def _meaning(self) -> tuple[object, ...]:
        """What else the loss of an image depends on."""
        run, options = self._run, self._run.options
        return (
            *self._losses.objective.loss_settings(),
            base_model_fingerprint(options),
            run.architecture.latent_recipe(run.layouts, options),
            run.architecture.text_recipe(run.layouts, options),
        )

    def _curves(self, measured: Measured, kinds: Sequence[str], training_average: float) -> dict[str, float]:
        curves = {f"timestep_{timestep}": mean for timestep, mean in measured.by_timestep.items()}
        curves |= {f"{kind}_average": measured.mean for kind in kinds}
        curves |= {f"{kind}_divergence": measured.mean - training_average for kind in kinds}
        if self.record.baseline is not None:
            curves["baseline"] = self.record.baseline
        return {f"loss/validation/{name}": value for name, value in curves.items() if math.isfinite(value)}

    def _tell(self, mean: float, step: int, before: ValidationRecord) -> None:
        if not math.isfinite(mean):
            logger.warning("validation after step %d: the loss is not finite (%s)", step, mean)
            return
        facts = [] if self.record.baseline is None else [f"base model {self.record.baseline:.4f}"]
        if self.record.best_step == step:
            facts.append("the best so far")
        elif before.best is not None:
            facts.append(f"best {before.best:.4f} at step {before.best_step}")
        logger.info("validation after step %d: %.4f%s", step, mean, f" ({', '.join(facts)})" if facts else "")
