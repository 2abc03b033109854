"""Ctrl-C and SIGTERM: finish the step, save, and leave with the exit status the signal stands for."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

LAUNCHER_MARK = "ACCELERATE_MIXED_PRECISION"  # set by accelerate launch for what it starts
LAUNCHER_CHECK_S = 0.5


class StopRequest:
    """While entered, SIGINT and SIGTERM are remembered instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, 143 for SIGTERM: 128 + the signal's number."""
        return 128 + (self.signal_number or signal.SIGTERM)

    def __bool__(self) -> bool:
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


def watch_launcher() -> None:
    """Sends this process SIGTERM when the launcher that started it is gone; called at a script's start.

    ``accelerate launch`` hands no SIGTERM on to a single process, which would go on alone. Windows has no such signal.
    """
    if LAUNCHER_MARK not in os.environ or os.name == "nt":
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LAUNCHER_CHECK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


SECRET_FLAGS = ("--wandb_api_key", "--huggingface_token")
START_FLAGS = ("--resume", "--initial_step", "--initial_epoch")  # where a run begins: the new --resume says it
START_SWITCHES = ("--skip_until_initial_step", "--resume_from_huggingface")


def without_secrets(words: Sequence[str]) -> list[str]:
    """``words`` of a command line without the flags of keys and tokens, and without their values."""
    return _without(words, SECRET_FLAGS)


def _without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif _means_one_of(word.split("=", 1)[0], flags):
            skip = "=" not in word  # its value follows
        else:
            kept.append(word)
    return kept


def _means_one_of(word: str, flags: Sequence[str]) -> bool:
    """Whether it is one of ``flags``, in full or shortened."""
    return len(word) > len("--") and word.startswith("--") and any(flag.startswith(word) for flag in flags)


def resume_command(folder: Path, *, windows: bool = os.name == "nt") -> str:
    """The command line of this run with --resume, quoted for the system's shell.

    Secrets are left out, and so is what said where this run began: it would count again.
    """
    words = _without(sys.argv, (*SECRET_FLAGS, *START_FLAGS))
    kept = [word for word in words if not _means_one_of(word.split("=", 1)[0], START_SWITCHES)]
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = [Path(sys.executable).name]
    if processes != "1":
        launcher = ["accelerate", "launch", "--num_processes", processes]
    elif LAUNCHER_MARK in os.environ:
        launcher = ["accelerate", "launch"]
    words = [*launcher, *kept, "--resume", str(folder)]
    return subprocess.list2cmdline(words) if windows else shlex.join(words)
