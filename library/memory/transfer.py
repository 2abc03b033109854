"""Copies between host and device memory that go on beside the computing.

"Queued" is what the current stream of the device has been given so far; on a CPU, which has no queue, that is what was done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """One copy under way. It holds both tensors, so that their memory is not given to others before it is waited for."""

    target: Tensor
    source: Tensor
    done: Any = None  # what the transfer waits for


class Transfer(Protocol):
    """How copies are made. Between ``start`` and ``wait`` nobody else reads the target, or writes the source."""

    def host_memory(self, nbytes: int) -> Tensor:
        """Bytes (nbytes,) of host memory from which, and into which, copies are fast."""

    def start(self, target: Tensor, source: Tensor) -> Copy:
        """Copies ``source`` into ``target``, of the same shape and dtype, when all that is queued is done; does not wait."""

    def wait(self, copy: Copy) -> None:
        """What is queued from now on comes after the copy. The host itself does not wait."""


class PlainTransfer:
    """Each copy is made, and waited for, where it is started. For every kind of device."""

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def start(self, target: Tensor, source: Tensor) -> Copy:
        target.copy_(source.detach())
        return Copy(target, source)

    def wait(self, copy: Copy) -> None:
        """It is done."""


class CudaTransfer:
    """Copies run one after the other on a stream of their own, beside the stream that computes."""

    def __init__(self, device: torch.device):
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)
        self._under_way: list[Copy] = []
        self._can_pin = True

    def host_memory(self, nbytes: int) -> Tensor:
        """Pinned where the system allows it: only then a copy runs beside the computing.

        Torch keeps pinned memory that was freed and hands it out again when the copies that use it are done.
        """
        if self._can_pin:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._can_pin = False
                reason = str(error).splitlines()[0]
                logger.warning("warning: no more CPU memory can be pinned (%s): copies to the GPU will be slower", reason)
        return torch.empty(nbytes, dtype=torch.uint8)

    def start(self, target: Tensor, source: Tensor) -> Copy:
        copy = Copy(target, source, torch.cuda.Event())
        self._drop_forgotten()
        self._under_way.append(copy)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source.detach(), non_blocking=True)
            copy.done.record(self._stream)
        return copy

    def wait(self, copy: Copy) -> None:
        torch.cuda.current_stream(self._device).wait_event(copy.done)
        if copy in self._under_way:
            self._under_way.remove(copy)

    def _drop_forgotten(self) -> None:
        """A step that ended in an error leaves copies that nobody waits for; until they are done their memory stays taken.

        That is also why no tensor needs ``record_stream``, which would give memory back late, and at no certain time.
        """
        self._under_way = [copy for copy in self._under_way if not copy.done.query()]


def transfer_for(device: torch.device) -> Transfer:
    """The fastest transfer that this kind of device has."""
    return CudaTransfer(device) if device.type == "cuda" else PlainTransfer()
