"""Going on with a run, or starting it in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeOptions:
    """Resume: go on from a saved state, or start later in the data."""

    resume: str | None = opt(None, "folder of a saved state to go on from, or latest for the newest one of this run", path=True)
    skip_until_initial_step: bool = opt(
        False, "skip the data of the steps before the initial one too; without it only the count starts there"
    )
    initial_epoch: int | None = opt(None, "epoch to start at, counted from 1 (not set = the first, or the state's)")
    initial_step: int | None = opt(
        None, "steps to count as done already; wins over --initial_epoch (not set = 0, or the state's)"
    )

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "initial_epoch")
        yield from at_least(self, 0, "initial_step")
        if self.skip_until_initial_step and self.initial_step is None and self.initial_epoch is None and not self.resume:
            yield "--skip_until_initial_step needs --initial_step, --initial_epoch or --resume: give one, or drop it"
