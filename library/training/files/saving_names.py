"""Names of what a run writes, and which old ones make way. Pure functions; nothing here imports torch.

The names are the reference's, so that scripts and habits carry over (see docs/resume.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.saving import SavingOptions

DEFAULT_EPOCH_NAME, DEFAULT_STEP_NAME, DEFAULT_LAST_NAME, DEFAULT_BEST_NAME = "epoch", "at", "last", "best"
BEST_SUFFIX = "-best"
STATE_SUFFIX = "-state"


@dataclass(frozen=True, slots=True)
class OutputNames:
    """Paths of LoRA files and states. ``epoch`` is 1-based, ``step`` counts optimizer steps."""

    folder: Path
    name: str | None
    extension: str  # with the dot

    @classmethod
    def of(cls, saving: SavingOptions) -> OutputNames:
        assert saving.output_dir is not None  # SavingOptions.problems() asks for it
        return cls(Path(saving.output_dir), saving.output_name, f".{saving.save_model_as or 'safetensors'}")

    def _epoch_stem(self, epoch: int) -> str:
        return f"{self.name or DEFAULT_EPOCH_NAME}-{epoch:06d}"

    def _step_stem(self, step: int) -> str:
        return f"{self.name or DEFAULT_STEP_NAME}-step{step:08d}"

    def epoch_file(self, epoch: int) -> Path:
        return self.folder / (self._epoch_stem(epoch) + self.extension)

    def step_file(self, step: int) -> Path:
        return self.folder / (self._step_stem(step) + self.extension)

    def last_file(self) -> Path:
        return self.folder / ((self.name or DEFAULT_LAST_NAME) + self.extension)

    def best_file(self) -> Path:
        """The LoRA with the lowest validation loss so far."""
        return self.folder / ((f"{self.name}{BEST_SUFFIX}" if self.name else DEFAULT_BEST_NAME) + self.extension)

    def old_best_file(self, step: int) -> Path:
        """Where the best LoRA of ``step`` goes when a new best cannot be compared with it."""
        best = self.best_file()
        return best.with_name(f"{best.stem}-step{step:08d}{best.suffix}")

    def epoch_state(self, epoch: int) -> Path:
        return self.folder / (self._epoch_stem(epoch) + STATE_SUFFIX)

    def step_state(self, step: int) -> Path:
        return self.folder / (self._step_stem(step) + STATE_SUFFIX)

    def last_state(self) -> Path:
        return self.folder / ((self.name or DEFAULT_LAST_NAME) + STATE_SUFFIX)

    def stems(self) -> list[str]:
        """What the names of all that this run writes begin with."""
        return [*self._state_stems(), DEFAULT_BEST_NAME] if not self.name else [self.name]

    def _state_stems(self) -> list[str]:
        return [self.name] if self.name else [DEFAULT_EPOCH_NAME, DEFAULT_STEP_NAME, DEFAULT_LAST_NAME]

    def states(self) -> list[Path]:
        """Every state folder of this run's name in the output folder, complete or not."""
        if not self.folder.is_dir():
            return []
        folders = (path for path in self.folder.iterdir() if path.is_dir())
        return sorted(path for path in folders if any(_is_state_of(path.name, stem) for stem in self._state_stems()))


def _is_state_of(folder_name: str, stem: str) -> bool:
    if not folder_name.startswith(stem) or STATE_SUFFIX not in folder_name:
        return False
    middle, _, rest = folder_name[len(stem) :].partition(STATE_SUFFIX)
    counted = middle.removeprefix("-step").removeprefix("-")
    return rest in ("", ".replaced") and (middle == "" or counted.isdigit())


@dataclass(frozen=True, slots=True)
class DueSave:
    """What is saved at one moment, and the old files and states that make way for it afterwards."""

    file: Path
    state: Path
    makes_way: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class SaveSchedule:
    """When a run saves and what it removes then, from the saving flags and the number of epochs."""

    every_n_epochs: int | None
    every_n_steps: int | None
    keep_epochs: int | None
    keep_epoch_states: int | None
    keep_steps: int | None
    keep_step_states: int | None
    epochs: int

    @classmethod
    def of(cls, saving: SavingOptions, epochs: int) -> SaveSchedule:
        every_n_epochs = saving.save_every_n_epochs
        if saving.save_n_epoch_ratio:
            every_n_epochs = epochs // saving.save_n_epoch_ratio or 1
        return cls(
            every_n_epochs=every_n_epochs,
            every_n_steps=saving.save_every_n_steps,
            keep_epochs=saving.save_last_n_epochs,
            keep_epoch_states=saving.save_last_n_epochs_state or saving.save_last_n_epochs,
            keep_steps=saving.save_last_n_steps,
            keep_step_states=saving.save_last_n_steps_state or saving.save_last_n_steps,
            epochs=epochs,
        )

    def due(self, step: int, ended_epoch: int | None, names: OutputNames) -> list[DueSave]:
        """What is due after ``step``, which ended ``ended_epoch`` or none."""
        due: list[DueSave] = []
        if self.saves_step(step):
            due.append(DueSave(names.step_file(step), names.step_state(step), tuple(self.made_way_for_step(step, names))))
        if ended_epoch is not None and self.saves_epoch(ended_epoch):
            old = tuple(self.made_way_for_epoch(ended_epoch, names))
            due.append(DueSave(names.epoch_file(ended_epoch), names.epoch_state(ended_epoch), old))
        return due

    def saves_epoch(self, epoch: int) -> bool:
        """The last epoch is only the final file."""
        return bool(self.every_n_epochs) and epoch % (self.every_n_epochs or 1) == 0 and epoch < self.epochs

    def saves_step(self, step: int) -> bool:
        return bool(self.every_n_steps) and step % (self.every_n_steps or 1) == 0

    def made_way_for_epoch(self, epoch: int, names: OutputNames) -> list[Path]:
        """The old LoRA file and state that go once those of ``epoch`` are saved."""
        file, state = self.epoch_to_remove(epoch), self.epoch_state_to_remove(epoch)
        return [*([names.epoch_file(file)] if file else []), *([names.epoch_state(state)] if state else [])]

    def made_way_for_step(self, step: int, names: OutputNames) -> list[Path]:
        """The old LoRA file and state that go once those of ``step`` are saved."""
        file, state = self.step_to_remove(step), self.step_state_to_remove(step)
        return [*([names.step_file(file)] if file else []), *([names.step_state(state)] if state else [])]

    def epoch_to_remove(self, epoch: int) -> int | None:
        return self._old_epoch(epoch, self.keep_epochs)

    def epoch_state_to_remove(self, epoch: int) -> int | None:
        return self._old_epoch(epoch, self.keep_epoch_states)

    def step_to_remove(self, step: int) -> int | None:
        return self._old_step(step, self.keep_steps)

    def step_state_to_remove(self, step: int) -> int | None:
        return self._old_step(step, self.keep_step_states)

    def _old_epoch(self, epoch: int, keep: int | None) -> int | None:
        """With ``keep`` epoch files kept, the one that makes way once ``epoch`` is saved."""
        if keep is None or self.every_n_epochs is None:
            return None
        old = epoch - self.every_n_epochs * keep
        return old if old > 0 else None

    def _old_step(self, step: int, keep: int | None) -> int | None:
        """Steps older than ``keep`` steps make way; the flag counts steps, not files."""
        if keep is None or self.every_n_steps is None:
            return None
        old = step - keep - 1
        old -= old % self.every_n_steps
        return old if old > 0 else None
