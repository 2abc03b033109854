"""Mistakes that the user can mend, and how a script ends on them.

Everything a user can cause is a :class:`UserError`: it carries one or more problems, each saying what was found, where,
and what to do. A script shows them as one block on stderr and exits with status 2; no traceback, nothing lost.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

EXIT_USER_ERROR = 2
EXIT_CTRL_C = 130  # 128 + SIGINT
PATIENCE_S = 10.0  # how long other processes wait for the main one to tell an error; longer where the checks took longer
LOOK_EVERY_S = 0.1


class UserError(Exception):
    """One or more problems that the user can mend. ``problems`` holds each as a sentence without a trailing newline."""

    is_found_by_all = False  # by all processes of a run, at the same place

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class OptionError(UserError):
    """A flag, its value, or a combination of flags cannot work."""


class DatasetError(UserError):
    """The dataset file, an image, a caption or the way they fit together."""


class CheckpointError(UserError):
    """A model, LoRA or state file is missing, damaged, or of another kind than needed."""


class NetworkError(UserError):
    """A network module or one of its arguments."""


class NoModuleFits(NetworkError):
    """A LoRA file has nothing for the models that it is to change."""


class OutputError(UserError):
    """Something could not be written."""


class TrainingError(UserError):
    """Training cannot go on (for example, the loss is not finite again and again)."""


def error_block(error: UserError, *, process: int | None = None) -> str:
    """The text shown on stderr: one problem on one line, several as a list. ``process``: the one of several that speaks."""
    start = "error" if process is None else f"error (process {process})"
    if len(error.problems) == 1:
        return f"{start}: {error.problems[0]}"
    return "\n".join([f"{start}: several things must be mended:", *(f"  - {problem}" for problem in error.problems)])


def found_by_all(error: UserError) -> UserError:
    """Marks an error that all processes of a run raise alike, so that the main one alone tells it."""
    error.is_found_by_all = True
    return error


class ProblemList:
    """Collects what goes wrong in independent checks, to report it together."""

    def __init__(self) -> None:
        self._problems: list[str] = []
        self._kind: type[UserError] = OptionError

    def __bool__(self) -> bool:
        return bool(self._problems)

    def add(self, *problems: str) -> None:
        self._problems += problems

    @contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self._kind = type(error)
            self._problems += error.problems

    def raise_if_any(self) -> None:
        """One error of the last kind that was collected, with all problems."""
        if self._problems:
            raise self._kind(*self._problems)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean X?)"`` for the nearest of ``known``, or an empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def os_error_text(error: OSError) -> str:
    """The reason of an operating-system error in words a user can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission to write there: choose another folder or change its permissions"
    return error.strerror or str(error)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around printing: ``| head`` has read enough, which ends it without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


@contextmanager
def user_errors_end_the_script(*, all_processes: bool = False) -> Iterator[None]:
    """Wraps ``main()``: a :class:`UserError` becomes its block on stderr and exit status 2, Ctrl-C exit status 130.

    Of several processes that all find the same, only the main one speaks. ``all_processes``: where each may meet an error
    that the others do not see, each speaks and says which one it is.
    """
    started = time.monotonic()
    try:
        yield
    except UserError as error:
        sys.stdout.flush()
        rank, is_alone = int(os.environ.get("RANK", "0")), os.environ.get("WORLD_SIZE", "1") == "1"
        each_speaks = all_processes and not error.is_found_by_all
        process = rank if rank or (each_speaks and not is_alone) else None
        if rank and not each_speaks:
            _let_the_main_process_speak(seconds=max(PATIENCE_S, time.monotonic() - started))
        print(error_block(error, process=process), file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is saved and cached", file=sys.stderr, flush=True)
        sys.exit(EXIT_CTRL_C)


def ctrl_c_ends_quietly() -> None:
    """For a script's first lines: Ctrl-C while modules are imported, where nothing handles it yet, is exit status 130 without a
    traceback."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.exit(EXIT_CTRL_C)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def _let_the_main_process_speak(*, seconds: float) -> None:
    """The launcher ends all processes once one has ended: one that is faster must not end the main one before it has spoken.

    As a rule the launcher ends this process while it waits here. Where it does not, the main process has met no error, or is
    under no launcher: then this process has to speak. It leaves without a word when its launcher is gone.
    """
    launcher, end = os.getppid(), time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(LOOK_EVERY_S)
        if os.getppid() != launcher:
            sys.exit(EXIT_USER_ERROR)
