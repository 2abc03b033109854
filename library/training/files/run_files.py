"""The LoRA files and states of a run: who writes them, and what is never written."""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from library.errors import OutputError, TrainingError
from library.files.atomic import TEMPORARY_MARK
from library.files.left_overs import remove_left_overs
from library.training.files.hub import HubUploads
from library.training.files.metadata import LoraMetadata
from library.training.files.saving import other_places, remove_old, save_dtype, save_network
from library.training.files.saving_names import OutputNames
from library.training.files.state import StateDescription, remove_replaced_states, save_state
from library.training.optimizing.learner import Learner
from library.training.preflight import CheckedRun
from library.training.running.processes import HostGroup
from library.training.steps import Progress

CURES = (
    "try a lower --learning_rate, --mixed_precision bf16 instead of fp16, --no_half_vae, a smaller --max_grad_norm, or with "
    "--full_fp16 --optimizer_args eps=1e-4"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Called by all processes alike; the main one writes. Weights that are not finite are never saved."""

    run: CheckedRun
    learner: Learner
    metadata: LoraMetadata
    group: HostGroup
    is_main: bool
    uploads: HubUploads

    def save_lora(
        self,
        file: Path,
        progress: Progress,
        *,
        last: bool = False,
        in_haste: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Optimizers that keep an average of the weights swap it in for the moment.

        ``last``: the run's final file. ``in_haste``: without waiting for hashes of the model files that are still being
        computed. ``notes``: further metadata, as whole ``ss_*`` keys. Raises OutputError, which says where the LoRA is now.
        """
        self._check_weights(progress)
        self._write_or_rescue(file, progress, last=last, wait=not in_haste, notes=notes)
        self.uploads.add(file)

    def keep_old_best(self, step: int) -> None:
        """The best LoRA so far, of ``step``, gets a name of its own. Where that name is taken, this has been done before."""
        best, kept = self.run.names.best_file(), self.run.names.old_best_file(step)
        if self.is_main and best.exists() and not kept.exists():
            self.uploads.leave(best)
            best.rename(kept)
            logger.info("kept %s as %s: its validation loss cannot be compared with the new one", best.name, kept)

    def save_state(self, folder: Path, description: StateDescription) -> None:
        self._check_weights(description.progress)
        training = self.learner.gathered_state(self.group)
        if self.is_main:
            self.uploads.leave(folder)
            save_state(folder, description, network=self.learner.network.state_dict(), training=training)
            logger.info("saved the state %s", folder)
        if self.uploads.takes_states:
            self.uploads.add(folder)

    def remove(self, *old: Path) -> None:
        """Files and states that made way for newer ones, which are in place by now. Called when all is saved that a step owes:
        training waits here for uploads, unless it is not to."""
        if self.uploads.holds_training:
            self._wait_for_uploads()
        if self.is_main:
            self.uploads.leave(*old)
            remove_old(*old)

    def close(self) -> None:
        """Waits for the uploads that are still under way."""
        if self.uploads.is_on:
            self._wait_for_uploads()

    def _wait_for_uploads(self) -> None:
        self.uploads.wait()
        self.group.wait()  # however long it takes: in the training's own group the others would give up

    def end_diverged_run(self, progress: Progress, *, step: int, untrained: bool = False) -> NoReturn:
        """Saves the last weights that gave a finite loss, and leaves with an error. ``step``: the last that was not finite;
        ``untrained``: none ever was, so that there is nothing to save."""
        self.learner.weights.restore_good()
        if not self.learner.weights.are_finite():
            raise TrainingError(
                "the network's weights were not finite from the start: look at the --network_weights file or state"
            )
        if untrained:
            self.group.wait()  # a process that leaves makes the launcher end the others
            raise TrainingError(
                f"nothing was trained and no LoRA is saved: in none of {step} steps were the loss and its gradient finite. Look "
                f"for very large numbers (loss_weight and network_multiplier of the datasets, --prior_loss_weight); {CURES}"
            )
        file = self.run.names.last_file()
        self._write_or_rescue(file, progress)  # save_lora would ask about the weights again
        self.uploads.add(file)
        self.uploads.wait()
        self.group.wait()
        raise TrainingError(
            f"the loss or the weights were not finite, last at step {step}; the last good weights are in {file}: {CURES}"
        )

    def _check_weights(self, progress: Progress) -> None:
        """All processes hold the same weights and decide alike."""
        if not self.learner.weights.are_finite():
            self.end_diverged_run(progress, step=progress.step)

    def _write_or_rescue(self, file: Path, progress: Progress, **how: Any) -> None:
        """A disk that is full or gone ends the run, but what was trained is kept on another one."""
        try:
            self._write_lora(file, progress, **how)
        except OutputError as error:
            for place in other_places(file):
                if self._is_written(place, progress, **how):
                    raise OutputError(
                        f"{error}; the LoRA after step {progress.step} is in {place}: move it from there"
                    ) from error
            raise

    def _is_written(self, file: Path, progress: Progress, **how: Any) -> bool:
        try:
            self._write_lora(file, progress, **how)
        except OutputError:
            return False
        return True

    def _write_lora(
        self, file: Path, progress: Progress, *, last: bool = False, wait: bool = True, notes: Mapping[str, str] | None = None
    ) -> None:
        if not self.is_main:
            return
        self.uploads.leave(file)
        epochs_done = progress.position // self.run.length.steps_per_epoch
        metadata = self.metadata.at(step=progress.step, epoch=epochs_done, last=last, wait=wait, notes=notes)
        with self.learner.evaluating():
            saving = self.run.options.saving
            dtype = save_dtype(saving.save_precision)
            save_network(self.learner.network, file, dtype=dtype, metadata=metadata, layout=saving.save_format)
        logger.info("saved %s", file)


def remove_left_over_files(names: OutputNames) -> None:
    """Temporary files and states of an earlier run of this name that was killed while saving."""
    remove_replaced_states(names.states())
    for stem in names.stems():
        remove_left_overs([names.folder], f"{glob.escape(stem)}*{TEMPORARY_MARK}*")
