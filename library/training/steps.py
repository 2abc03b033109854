"""How many steps a run has, and where in the data a step lies. Pure arithmetic; nothing here imports torch.

A *micro-batch* is one forward and backward pass, an *update* (or step) is one optimizer step over up to
``gradient_accumulation_steps`` consecutive micro-batches of one epoch; the last update of an epoch may have fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.resume import ResumeOptions
from library.options.run import RunOptions


@dataclass(frozen=True, slots=True)
class RunLength:
    """Counts of a whole run. ``batches_per_epoch`` are micro-batches of all processes together."""

    batches_per_epoch: int
    accumulation: int
    total_steps: int

    @classmethod
    def of(cls, run: RunOptions, batches_per_epoch: int) -> RunLength:
        accumulation = run.gradient_accumulation_steps
        per_epoch = -(-batches_per_epoch // accumulation)
        total = run.max_train_epochs * per_epoch if run.max_train_epochs else run.max_train_steps
        return cls(batches_per_epoch, accumulation, total)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulation)

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.steps_per_epoch)

    def batches_of_update(self, position: int) -> tuple[int, range]:
        """(1-based epoch, micro-batch numbers within it) of the update that starts after ``position`` updates of data."""
        epoch, update = divmod(position, self.steps_per_epoch)
        first = update * self.accumulation
        return epoch + 1, range(first, min(first + self.accumulation, self.batches_per_epoch))

    def ended_epoch(self, position: int) -> int | None:
        """The epoch (1-based) whose last update was the one before ``position``; None in its middle and before the first."""
        epochs, rest = divmod(position, self.steps_per_epoch)
        return epochs if epochs and not rest else None

    def ended_by(self, start: Progress) -> tuple[range, range]:
        """The (1-based) steps and epochs that a run from ``start`` on ends, the last epoch perhaps in its middle."""
        last = start.position + self.total_steps - start.step
        epochs = range(start.position // self.steps_per_epoch + 1, -(-last // self.steps_per_epoch) + 1)
        return range(start.step + 1, self.total_steps + 1), epochs

    def left_epoch(self, progress: Progress) -> int | None:
        """As ``ended_epoch``; and the end of the run ends the epoch that it lies in, as in the reference's loop over epochs."""
        if progress.step == self.total_steps:
            return -(-progress.position // self.steps_per_epoch)
        return self.ended_epoch(progress.position)

    def micro_step(self, epoch: int, batch_index: int) -> int:
        """Number of a micro-batch counted over the whole run, from 0: what its noise is drawn for."""
        return (epoch - 1) * self.batches_per_epoch + batch_index


@dataclass(frozen=True, slots=True)
class Progress:
    """``step`` optimizer steps are done; the next update takes its data after ``position`` updates of data.

    The two differ only when a run starts with --initial_step without --skip_until_initial_step.
    """

    step: int = 0
    position: int = 0

    def after_update(self) -> Progress:
        return Progress(self.step + 1, self.position + 1)


def initial_progress(resume: ResumeOptions, length: RunLength, saved: Progress | None) -> Progress:
    """Where training begins.

    --initial_step N (or --initial_epoch E, 1-based) counts N steps as done: names, schedule and the step limit go on from
    there. With --skip_until_initial_step the data of those steps is skipped as well; without it the data of the epoch that
    contains step N is used from its beginning. They win over the position of a resumed state.
    """
    if resume.initial_step is not None:
        step = resume.initial_step
    elif resume.initial_epoch is not None:
        step = (resume.initial_epoch - 1) * length.steps_per_epoch
    else:
        return saved or Progress()
    if step >= length.total_steps:
        flag = "--initial_step" if resume.initial_step is not None else "--initial_epoch"
        raise OptionError(
            f"{flag} starts at step {step}, but the run ends at step {length.total_steps}: "
            "give a smaller one, or raise --max_train_steps or --max_train_epochs"
        )
    position = step if resume.skip_until_initial_step else step - step % length.steps_per_epoch
    return Progress(step, position)
