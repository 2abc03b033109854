"""Pictures drawn while training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

SAMPLERS = ("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
            "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Samples: pictures drawn while training."""

    sample_prompts: str | None = opt(None, "file of prompts (.txt, .toml or .json) to draw sample pictures from", path=True)
    sample_every_n_steps: int | None = opt(None, "draw pictures every N steps (not set or 0 = not by steps)")
    sample_every_n_epochs: int | None = opt(
        None, "draw pictures every N epochs; decides instead of steps (not set or 0 = not by epochs)"
    )
    sample_sampler: str | None = opt("ddim", "sampler of the pictures", choices=SAMPLERS)
    sample_at_first: bool = opt(False, "draw pictures before the first step too")

    def problems(self) -> Iterator[str]:
        if self.sample_prompts:
            return
        for name in self._triggers():
            yield f"--{name} needs --sample_prompts: name a file of prompts, or drop --{name}"

    def warnings(self) -> Iterator[str]:
        if self.sample_prompts and not self._triggers():
            yield "--sample_prompts draws nothing yet: add --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first"

    def _triggers(self) -> list[str]:
        intervals = {"sample_every_n_steps": self.sample_every_n_steps, "sample_every_n_epochs": self.sample_every_n_epochs}
        given = [name for name, interval in intervals.items() if interval is not None and interval > 0]
        return [*given, *(["sample_at_first"] if self.sample_at_first else [])]
