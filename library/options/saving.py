"""What is written, when, and what is deleted again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least

FILE_FORMATS = ("ckpt", "pt", "safetensors")
SAVE_FORMATS = ("comfy", "diffusers")
SAVE_PRECISIONS = ("float", "fp16", "bf16")
MAX_NAME_BYTES = 200  # of the 255 that file systems take
FORBIDDEN_ON_WINDOWS = frozenset(':?*<>|"') | {chr(code) for code in range(32)}  # as its file API documents


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingOptions:
    """Saving: LoRA files and states to go on from."""

    output_dir: str | None = opt(None, "folder for LoRA files, states and sample images; made if it is missing", path=True)
    output_name: str | None = opt(None, "start of the names of all files (not set = last, epoch and at)")
    save_model_as: str = opt("safetensors", "file format of the LoRA; ckpt and pt hold no metadata", choices=FILE_FORMATS)
    save_format: str | None = opt(
        None,
        "names and layout in the LoRA file: comfy or diffusers (not set = those of kohya-ss/sd-scripts, which most programs"
        " read)",
        choices=SAVE_FORMATS,
    )
    save_precision: str | None = opt(
        None, "number format of the saved weights (not set = the one they are trained in)", choices=SAVE_PRECISIONS
    )
    save_every_n_epochs: int | None = opt(None, "save a LoRA file after every N-th epoch (not set = only at the end)")
    save_every_n_steps: int | None = opt(None, "save a LoRA file after every N-th step (not set = only at the end)")
    save_n_epoch_ratio: int | None = opt(
        None, "save about N times, evenly spread over the epochs; decides --save_every_n_epochs (0 = off)"
    )
    save_last_n_epochs: int | None = opt(
        None, "keep the LoRA files of the last N saved epochs, delete older ones (not set = keep all)"
    )
    save_last_n_epochs_state: int | None = opt(None, "the same for states (not set = as --save_last_n_epochs)")
    save_last_n_steps: int | None = opt(None, "delete step files that are more than N steps old (not set = keep all)")
    save_last_n_steps_state: int | None = opt(None, "the same for states (not set = as --save_last_n_steps)")
    save_state: bool = opt(False, "with every LoRA file and at the end save a state, from which --resume goes on exactly")
    save_state_on_train_end: bool = opt(False, "save a state at the end only")
    no_metadata: bool = opt(False, "write only the few metadata entries that user interfaces need into LoRA files")
    training_comment: str | None = opt(None, "a note for the metadata of LoRA files, for example the trigger word")

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "save_every_n_epochs", "save_every_n_steps")
        yield from at_least(self, 0, "save_n_epoch_ratio")
        yield from at_least(
            self, 1, "save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state"
        )
        if self.output_name and ("/" in self.output_name or "\\" in self.output_name):
            yield f"--output_name is {self.output_name!r}: give the start of a file name; the folder is --output_dir"
        elif (length := len((self.output_name or "").encode("utf-8", "replace"))) > MAX_NAME_BYTES:
            yield f"--output_name has {length} bytes: give at most {MAX_NAME_BYTES}: endings such as -step00000500-state follow"
        elif forbidden := sorted(FORBIDDEN_ON_WINDOWS.intersection(self.output_name or "")):
            yield (
                f"--output_name is {self.output_name!r}: file names cannot hold {' '.join(map(repr, forbidden))} on Windows, and "
                "LoRA files travel; leave that out"
            )

    def warnings(self) -> Iterator[str]:
        saves_epochs = self.save_every_n_epochs or self.save_n_epoch_ratio
        states = self.save_state
        for name, is_used, cause in (
            ("save_last_n_epochs", saves_epochs, "--save_every_n_epochs"),
            ("save_last_n_steps", self.save_every_n_steps, "--save_every_n_steps"),
            ("save_last_n_epochs_state", saves_epochs and states, "--save_every_n_epochs and --save_state"),
            ("save_last_n_steps_state", self.save_every_n_steps and states, "--save_every_n_steps and --save_state"),
        ):
            if getattr(self, name) is not None and not is_used:
                yield f"--{name} does nothing without {cause}"
