"""What the processes of one run tell each other beside gradients: through host memory, however long one lets the others wait.

The training group of accelerate (NCCL on GPUs) pickles Python objects through GPU memory and gives up after minutes. This group
is gloo over the network: objects stay in host memory, and while one process encodes a cache for hours the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from library.errors import TrainingError

LONGEST_WAIT = timedelta(days=7)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0001, 0.05  # between looks at whether all have come

Value = TypeVar("Value")


class OtherProcessEnded(TrainingError):
    """Another process of the run has ended or does not answer, so that nothing can be done together any more."""


class HostGroup:
    """All processes of the run; with one process every method is the identity.

    Make it once in every process, after the Accelerator. Every method must be called by all processes in the same order. A
    process that ends meanwhile makes the others raise OtherProcessEnded. Waiting heeds Ctrl-C.
    """

    def __init__(self, *, timeout: timedelta = LONGEST_WAIT):
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.processes = dist.get_world_size() if together else 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if together else None

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self._group is None:
            return
        with _others_are_needed():
            meeting = dist.barrier(group=self._group, async_op=True)
            pause = FIRST_PAUSE_S
            while not meeting.is_completed():  # wait() alone would keep signals waiting too
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            meeting.wait()

    def gather(self, value: Value) -> list[Value]:
        """The value of each process, in rank order, in every process. Anything that pickles; tensors on the CPU.

        Needs memory for all values several times over: hand large ones over in pieces.
        """
        if self._group is None:
            return [value]
        self.wait()
        values = [value] * self.processes
        with _others_are_needed():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def any(self, flag: bool) -> bool:
        """True when the flag is set in any process, so that all take the same way."""
        return any(self.gather(flag))

    def broadcast(self, value: Value) -> Value:
        """The value of process 0, in every process."""
        if self._group is None:
            return value
        self.wait()
        values = [value]
        with _others_are_needed():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


@contextmanager
def ends_of_others_are_told() -> Iterator[None]:
    """Around work that includes torch's own exchange of gradients: what it raises when another process has ended becomes
    OtherProcessEnded. Of gloo that is a plain RuntimeError, known by its text alone."""
    try:
        yield
    except RuntimeError as error:
        is_of_group = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))
        if dist.is_initialized() and is_of_group:
            raise _ended(error) from error
        raise


@contextmanager
def _others_are_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: the connection was closed, or the time is over
        raise _ended(error) from error


def _ended(error: RuntimeError) -> OtherProcessEnded:
    return OtherProcessEnded(f"another process of this run has ended or does not answer; its own message says why ({error})")
