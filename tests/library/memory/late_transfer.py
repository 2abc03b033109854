"""Transfers that make mistakes in the order of things show."""

from __future__ import annotations

import torch
from torch import Tensor

from library.memory.transfer import Copy, PlainTransfer


class LateTransfer(PlainTransfer):
    """A copy is made when it is waited for, not before; until then its target holds NaNs.

    So a weight that is used too early, or overwritten too early, is a NaN; and a source that is written too early arrives wrong.
    """

    def __init__(self):
        self.started = 0
        self.waiting: list[Copy] = []

    def start(self, target: Tensor, source: Tensor) -> Copy:
        self.started += 1
        poison(target)
        copy = Copy(target, source)
        self.waiting.append(copy)
        return copy

    def wait(self, copy: Copy) -> None:
        if any(copy is other for other in self.waiting):
            self.waiting = [other for other in self.waiting if other is not copy]
            with torch.no_grad():
                copy.target.copy_(copy.source)


class CountingTransfer(PlainTransfer):
    """Counts the bytes that cross, and the copies."""

    def __init__(self):
        self.nbytes = self.copies = 0

    def start(self, target: Tensor, source: Tensor) -> Copy:
        self.nbytes += source.nbytes
        self.copies += 1
        return super().start(target, source)


def poison(tensor: Tensor) -> None:
    """All bits set is a NaN in every float format, float8_e4m3fn too."""
    tensor.detach().view(-1).view(torch.uint8).fill_(0xFF)
