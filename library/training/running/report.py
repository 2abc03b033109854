"""What a person sees while training: the progress bar and the trackers' curves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from library.training.running.meters import StepNumbers

if TYPE_CHECKING:
    from accelerate import Accelerator

GIB = 2**30


def peak_memory_gib() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident memory of the host."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    if sys.platform == "linux":  # getrusage would count what the launcher took before it started this process
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB
    if sys.platform == "win32":
        import psutil  # accelerate depends on it

        return psutil.Process().memory_info().peak_wset / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # bytes on macOS


class Report:
    """Shows and logs each finished step. ``total`` and ``done`` count optimizer steps."""

    def __init__(self, accelerator: Accelerator, *, total: int, done: int, visible: bool):
        from tqdm import tqdm

        self._accelerator = accelerator
        self._bar = tqdm(total=total, initial=done, desc="steps", unit="it", disable=not visible, dynamic_ncols=True)

    def step(self, numbers: StepNumbers, *, average: float, epoch: int, epochs: int) -> None:
        self._bar.set_description(f"epoch {min(epoch, epochs)}/{epochs}", refresh=False)
        self._bar.set_postfix(loss=f"{numbers.loss:.4f}", average=f"{average:.4f}", refresh=False)
        self._bar.update(numbers.step - self._bar.n)
        if self._accelerator.trackers:
            self.log(self._values(numbers, average), numbers.step)

    @staticmethod
    def _values(numbers: StepNumbers, average: float) -> dict[str, float]:
        values = {
            "loss/average": average,
            "norm/grad": numbers.grad_norm,
            "memory/peak_gib": peak_memory_gib(),
            **numbers.curves,
        }
        return {"loss/current": numbers.loss, **values} if numbers.finite else values

    def log(self, values: dict[str, float], step: int) -> None:
        """Other curves than a step's own."""
        if self._accelerator.trackers:
            self._accelerator.log(values, step=step)

    @contextmanager
    def passing_bar(self, what: str, total: int) -> Iterator[Callable[[], object]]:
        """A second bar, which goes when its work is done. Gives what counts one on."""
        from tqdm import tqdm

        with tqdm(total=total, desc=what, leave=False, disable=self._bar.disable, dynamic_ncols=True) as bar:
            yield bar.update

    def close(self) -> None:
        self._bar.close()
