"""Whether the disk of the output folder has room for what a run is going to write; asked before training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from library.errors import OutputError
from library.training.preflight import CheckedRun

MIB = 2**20
RESERVE_BYTES = MIB  # besides the weights: names, metadata, previews' folders


def check_room(run: CheckedRun, *, lora_bytes: int, state_bytes: int) -> Iterator[str]:
    """Warns where the planned files do not fit together. Raises OutputError where not even the final LoRA does.

    ``lora_bytes`` and ``state_bytes``: of one file and of one state.
    """
    folder = run.names.folder
    free = free_bytes(folder)
    if free is None:
        return
    if lora_bytes + RESERVE_BYTES > free:
        raise OutputError(
            f"the LoRA takes about {lora_bytes / MIB:,.2f} MiB, and {RESERVE_BYTES // MIB} MiB should stay free, but "
            f"--output_dir {folder} has {free / MIB:,.1f} MiB free: free some space, or choose a folder on another disk"
        )
    needed = peak_bytes(run, lora_bytes=lora_bytes, state_bytes=state_bytes)
    if needed + RESERVE_BYTES > free:
        yield (
            f"--output_dir {folder} has {free / MIB:,.1f} MiB free, but all LoRA files and states of this run take about "
            f"{needed / MIB:,.1f} MiB: free some space, save less often, or keep fewer "
            "(--save_last_n_epochs, --save_last_n_steps)"
        )


def free_bytes(folder: Path) -> int | None:
    """Of the disk of ``folder``, which may not be there yet; None where the system does not know."""
    place = next((path for path in (folder, *folder.resolve().parents) if path.exists()), None)
    try:
        usage = shutil.disk_usage(place or Path.cwd())
    except OSError:
        return None
    return usage.free if usage.total else None  # some network disks tell 0 of everything


def peak_bytes(run: CheckedRun, *, lora_bytes: int, state_bytes: int) -> int:
    """The most that the run's LoRA files and states take at one moment: old ones go when the new ones are there."""
    saving, kept, largest = run.options.saving, set[Path](), 0
    each_state = state_bytes if saving.save_state else 0
    best = lora_bytes if run.options.validation.save_best else 0
    size = best
    for step in range(run.start.step + 1, run.length.total_steps + 1):
        ended = run.length.ended_epoch(run.start.position + step - run.start.step)
        due = run.saves.due(step, ended, run.names)
        for save in due:
            kept |= {save.file, save.state}
            size += lora_bytes + each_state
        largest = max(largest, size)
        gone = kept.intersection(path for save in due for path in save.makes_way)
        kept -= gone
        size -= sum(each_state if path.suffix != run.names.extension else lora_bytes for path in gone)
    last_state = state_bytes if saving.save_state or saving.save_state_on_train_end else 0
    return max(largest, size + lora_bytes + last_state)
