"""How the learning rate changes over the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import above_zero, at_least

# Schedules that have no place for a warm-up -> the one to use instead.
WITHOUT_WARMUP = {"constant": "constant_with_warmup", "adafactor": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOptions:
    """Schedule: the learning rate over the run."""

    lr_scheduler: str = opt("constant", "name of the schedule: constant, linear, cosine and the like")
    lr_scheduler_type: str = opt(
        "", "class to use instead: module.Class, or a name of torch.optim.lr_scheduler (empty = --lr_scheduler)"
    )
    lr_scheduler_args: list[str] | None = opt(None, "more arguments for the schedule: key=value, such as T_max=100")
    lr_warmup_steps: int | float = opt(0, "steps of rising rate at the start, or their share of the run: 0.1 or 10% (0 = none)")
    lr_decay_steps: int | float = opt(0, "steps of falling rate at the end of warmup_stable_decay, or their share (0 = none)")
    lr_scheduler_num_cycles: int = opt(
        1, "how often cosine_with_restarts falls to 0; half waves of the other cosine schedules that have cycles"
    )
    lr_scheduler_power: float = opt(1, "power of the polynomial schedule (1 = a straight line)")
    lr_scheduler_timescale: int | None = opt(
        None, "steps that set the pace of inverse_sqrt (not set = the warm-up steps, else 10000)"
    )
    lr_scheduler_min_lr_ratio: float | None = opt(None, "lowest rate of schedules that have one, as a share of the learning rate")

    def problems(self) -> Iterator[str]:
        for name in ("lr_warmup_steps", "lr_decay_steps"):
            yield from at_least(self, 0, name)
            value = getattr(self, name)
            if isinstance(value, float) and value > 1:
                yield f"--{name} is {value:.0%} of the run: give 100% or less, or a whole number of steps"
        yield from at_least(self, 1, "lr_scheduler_num_cycles", "lr_scheduler_timescale")
        yield from above_zero(self, "lr_scheduler_power")
        if self.lr_scheduler_min_lr_ratio is not None and not 0 <= self.lr_scheduler_min_lr_ratio <= 1:
            yield f"--lr_scheduler_min_lr_ratio is {self.lr_scheduler_min_lr_ratio}: give a number from 0 to 1"
        yield from self._warmup_problems()

    def _warmup_problems(self) -> Iterator[str]:
        if not self.lr_warmup_steps:
            return
        found = f"--lr_warmup_steps is {self.lr_warmup_steps}, but"
        if self.lr_scheduler_type:
            yield f"{found} the class of --lr_scheduler_type has no warm-up: drop --lr_warmup_steps"
        elif self.lr_scheduler in WITHOUT_WARMUP:
            better = WITHOUT_WARMUP[self.lr_scheduler]
            instead = f"use --lr_scheduler={better}, or drop --lr_warmup_steps" if better else "drop --lr_warmup_steps"
            yield f"{found} --lr_scheduler={self.lr_scheduler} has no warm-up: {instead}"
