"""Ctrl-C and SIGTERM: finish the step, save, and leave with the exit status the signal stands for."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType, TracebackType

LAUNCHER_MARK = "ACCELERATE_MIXED_PRECISION"  # set by accelerate launch for what it starts


class StopRequest:
    """While entered, SIGINT and SIGTERM are remembered instead of ending the process; a second Ctrl-C ends it at once.

    ``accelerate launch`` hands no SIGTERM on to a single process: when the launcher is gone, that counts as one.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._launcher = os.getppid() if LAUNCHER_MARK in os.environ and os.name != "nt" else None
        self._previous: dict[int, object] = {}

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, 143 for SIGTERM: 128 + the signal's number."""
        return 128 + (self.signal_number or signal.SIGTERM)

    def __bool__(self) -> bool:
        if self.signal_number is None and self._launcher is not None and os.getppid() != self._launcher:
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_number is None and os.environ.get("RANK", "0") == "0":
            # os.write: a handler may run inside another print
            os.write(2, b"\nstopping after this step; the state and the LoRA will be saved (Ctrl-C again: stop at once)\n")
        self.signal_number = number


SECRET_FLAGS = ("--wandb_api_key", "--huggingface_token")
START_FLAGS = ("--resume", "--initial_step", "--initial_epoch")  # where a run begins: the new --resume says it
START_SWITCH = "--skip_until_initial_step"


def resume_command(folder: Path, *, windows: bool = os.name == "nt") -> str:
    """The command line of this run with --resume, quoted for the system's shell.

    Secrets are left out, and so is what said where this run began: it would count again.
    """
    kept, skip = [], False
    for word in sys.argv:
        flag = word.split("=", 1)[0]
        if skip:
            skip = False
        elif flag in (*SECRET_FLAGS, *START_FLAGS):
            skip = "=" not in word
        elif flag != START_SWITCH:
            kept.append(word)
    launcher = ["accelerate", "launch"] if LAUNCHER_MARK in os.environ else [Path(sys.executable).name]
    words = [*launcher, *kept, "--resume", str(folder)]
    return subprocess.list2cmdline(words) if windows else shlex.join(words)
