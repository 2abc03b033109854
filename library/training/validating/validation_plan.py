"""When a run validates, at which timesteps, and what it remembers of it. Pure; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.dataset.items import TrainingSet
from library.dataset.order import items_by_bucket
from library.options.validation import ValidationOptions
from library.training.steps import Progress, RunLength

LEVELS = 4  # noise levels at which each image is shown


def validation_timesteps(low: int, high: int) -> tuple[int, ...]:
    """Timesteps spread evenly inside [``low``, ``high``].

    The inner ones of six, rounded down, as in the reference: 200, 400, 600, 800. A range of less than five has fewer.
    """
    return tuple(dict.fromkeys(low + (high - low) * n // (LEVELS + 1) for n in range(1, LEVELS + 1)))


@dataclass(frozen=True, slots=True)
class ValidationSchedule:
    """After which steps and epochs a run validates; None: never by steps."""

    every_n_steps: int | None
    every_n_epochs: int

    @classmethod
    def of(cls, options: ValidationOptions) -> ValidationSchedule:
        return cls(options.validate_every_n_steps, options.validate_every_n_epochs or 1)

    def __str__(self) -> str:
        """For people: "after every epoch and every 100 steps"."""
        epochs = "every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs"
        steps = "" if self.every_n_steps is None else f" and every {self.every_n_steps} steps"
        return f"after {epochs}{steps}, and at the end"

    def due(self, progress: Progress, length: RunLength) -> tuple[str, ...]:
        """The names of the curves that get a point now: "step", "epoch", both or none. A run's end ends its last epoch."""
        step, ended_epoch = progress.step, length.ended_epoch(progress.position)
        by_step = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        by_epoch = step == length.total_steps or (ended_epoch is not None and ended_epoch % self.every_n_epochs == 0)
        return (("step",) if by_step else ()) + (("epoch",) if by_epoch else ())

    def times(self, length: RunLength) -> int:
        """How many validations a whole run has, apart from the base model's."""
        steps = set(range(self.every_n_steps, length.total_steps + 1, self.every_n_steps)) if self.every_n_steps else set()
        epochs = range(self.every_n_epochs, length.total_steps // length.steps_per_epoch + 1, self.every_n_epochs)
        return len(steps | {epoch * length.steps_per_epoch for epoch in epochs} | {length.total_steps})


def validation_batch_count(training_set: TrainingSet, limit: int | None) -> int:
    """Batches of one validation over all processes; ``limit`` is --max_validation_steps."""
    buckets = items_by_bucket(training_set.validation).items()
    count = sum(-(-len(items) // training_set.datasets[dataset].batch_size) for (dataset, _), items in buckets)
    return count if limit is None else min(count, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRecord:
    """What a run remembers of its validations; a part of its states. None: not known yet.

    ``measured`` names images, noise and kind of loss: losses of different ones cannot be compared. ``finished_step`` is the
    step after which the last validation ran to its end, which tells a resumed run whether one is still owed. ``images`` are
    the marks of ``validated_images``. ``displaced_step`` is the step of the best LoRA file where its loss does not count any
    more, as long as the file is in its place.
    """

    measured: str = ""
    baseline: float | None = None
    best: float | None = None
    best_step: int | None = None
    finished_step: int | None = None
    images: str = ""
    displaced_step: int | None = None

    @property
    def file_step(self) -> int | None:
        """The step of the best LoRA file that is in its place, if there is one."""
        return self.best_step if self.displaced_step is None else self.displaced_step


def noise_seed(options: Any) -> int:
    """Of the noise on validation images, and of the choice of images where a dataset sets no validation_seed.

    Never the random seed of a run without --seed: validations of two runs should be comparable.
    """
    seeds = (options.validation.validation_seed, options.run.seed, 0)
    return next(seed for seed in seeds if seed is not None)


NO_SPLIT = "none"  # what a state says that was saved before there was validation


def split_text(training_set: TrainingSet, options: Any) -> str:
    """The shares of images that validate, and the seeds that chose them, for a state: what a resumed run must not change."""
    parts = []
    for number, dataset in enumerate(training_set.datasets, start=1):
        seed = noise_seed(options) if dataset.validation_seed is None else dataset.validation_seed
        if dataset.validation_split:
            parts.append(f"{dataset.validation_split:g} of dataset {number} by seed {seed}")
    return ", ".join(parts) or NO_SPLIT
