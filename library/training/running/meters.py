"""Numbers of a step on their way to the host, without making the step wait for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host knows of a step when it has handed it to the device. ``started``: time.perf_counter() of its begin."""

    curves: dict[str, float] = field(default_factory=dict)  # such as learning rates
    started: float = 0.0
    images: int = 0  # of all processes
    waited_s: float = 0.0  # for data


@dataclass(frozen=True, slots=True)
class Arrived:
    """The numbers of a step, and how long it took: from its begin, or the end of the step before where that was later."""

    values: list[float]
    facts: HostFacts
    seconds: float

    def curves(self) -> dict[str, float]:
        speed = {"speed/images_per_s": self.facts.images / max(self.seconds, 1e-9), "speed/data_wait_s": self.facts.waited_s}
        return {**self.facts.curves, **speed}


class DelayedNumbers:
    """Hands out each step's numbers one step later, when the device has long finished computing them.

    Reading a tensor at once would make the host wait for the device between the steps; a copy into page-locked memory that is
    read at the next step does not.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None, HostFacts, float] | None = None
        self._last_end = 0.0  # of the step before, as far as the host knows

    def put(self, numbers: Tensor, facts: HostFacts) -> Arrived | None:
        """Starts the copy of ``numbers`` (1-D, on the device); returns those of the step before."""
        before = self.take()
        event = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            numbers = host
        self._pending = (numbers, event, facts, time.perf_counter())
        return before

    def take(self) -> Arrived | None:
        """The pending numbers, waiting for them if need be; None when there are none."""
        if self._pending is None:
            return None
        host, event, facts, end = self._pending
        self._pending = None
        if event is not None:  # else the step was computed when it was put
            event.synchronize()
            end = time.perf_counter()
        seconds = end - max(facts.started, self._last_end)
        self._last_end = end
        return Arrived(host.tolist(), facts, seconds)


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
