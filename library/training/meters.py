"""Numbers of a step on their way to the host, without making the step wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


class DelayedNumbers:
    """Hands out each step's numbers one step later, when the device has long finished computing them.

    Reading a tensor at once would make the host wait for the device between the steps; a copy into page-locked memory that is
    read at the next step does not.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None, dict[str, float]] | None = None

    def put(self, numbers: Tensor, known: dict[str, float]) -> tuple[list[float], dict[str, float]] | None:
        """Starts the copy of ``numbers`` (1-D, on the device); returns those of the step before.

        ``known`` are numbers of the step that the host knows already; they come back with the others.
        """
        before = self.take()
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (host, event, known)
        else:
            self._pending = (numbers, None, known)
        return before

    def take(self) -> tuple[list[float], dict[str, float]] | None:
        """The pending numbers, waiting for them if need be; None when there are none."""
        if self._pending is None:
            return None
        host, event, known = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        return host.tolist(), known


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What a finished step is known by.

    ``grad_norm`` is before clipping; ``finite`` False: the step was skipped; ``curves``: what
    else is logged of it, such as the learning rates it was taken with.
    """

    step: int
    loss: float
    grad_norm: float
    finite: bool
    stop_wanted: bool  # some process was asked to stop
    curves: dict[str, float]


class LossAverage:
    """Mean loss over the last epoch's worth of steps, as shown in the progress bar."""

    def __init__(self, window: int, losses: Iterable[float] = ()):
        self._losses: deque[float] = deque(losses, maxlen=max(window, 1))

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    @property
    def is_empty(self) -> bool:
        """Whether no step of the run, nor of those before the state that it goes on from, had a finite loss and gradient."""
        return not self._losses

    @property
    def mean(self) -> float:
        return sum(self._losses) / len(self._losses) if self._losses else float("nan")

    def values(self) -> list[float]:
        return list(self._losses)
