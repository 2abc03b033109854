"""Checkpointing whose kept activations wait in host memory: of each block its input, read again in the backward pass.

As in library/nn/checkpointing.py a block is computed again during backward; the other inputs (context, noise level, rotary
tables) are small or shared by all blocks and stay on the device.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.memory.transfer import Copy, Transfer


class OffloadingRunner:
    """A ``BlockRunner`` (library/nn/blocks.py) that checkpoints wherever gradients are recorded.

    ``ahead``: the input of the block before is fetched while a block's backward computes, which takes a transfer that works
    beside the computing, and room for one more input.
    """

    def __init__(self, transfer: Transfer, *, ahead: bool):
        self._transfer = transfer
        self._ahead = ahead
        self._latest: weakref.ref[WaitingInput] | None = None

    def __call__(self, number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return block(x, *inputs)
        before = self._latest() if self._latest is not None and number > 0 else None
        if before is not None:
            before.has_left()
        waiting = WaitingInput(x, self._transfer, before if self._ahead else None)
        self._latest = weakref.ref(waiting)
        # Checkpointing looks at the tensors it is given for the device whose random numbers it must repeat: hence the marker.
        marker = x.new_empty(0)
        out = checkpoint(partial(_run, block, waiting), marker, *inputs, use_reentrant=False)
        assert isinstance(out, Tensor)
        if out.requires_grad:
            out.register_hook(partial(_fetch, waiting))
        return out


def _run(block: nn.Module, waiting: WaitingInput, marker: Tensor, *inputs: Any) -> Tensor:
    """In the forward pass and again in the backward pass."""
    return block(waiting.take(), *inputs)


def _fetch(waiting: WaitingInput, gradient: Tensor) -> None:
    """The block's backward is about to begin."""
    waiting.start_return()
    if waiting.before is not None:
        waiting.before.start_return()


class WaitingInput:
    """A block's input: for its forward pass the tensor itself, from then on a copy in host memory.

    The copy lives as long as the graph that may ask for it; the tensor until the copy is made.
    """

    def __init__(self, x: Tensor, transfer: Transfer, before: WaitingInput | None):
        """``before``: the input of the block before, where its copy shall be fetched early."""
        self.before = before
        self._transfer = transfer
        self._wants_grad = x.requires_grad
        self._device = x.device
        self._now: Tensor | None = x
        self._host = transfer.host_memory(x.nbytes).view(x.dtype).view(x.shape)
        self._leaving: Copy | None = transfer.start(self._host, x)
        self._returning: Copy | None = None

    def take(self) -> Tensor:
        """First the tensor itself, which is part of the graph; later ones are copies that stand for it."""
        if self._now is not None:
            x, self._now = self._now, None
            return x
        self.start_return()
        assert self._returning is not None
        copy, self._returning = self._returning, None  # a graph that is kept may be run backward again
        self._transfer.wait(copy)
        return copy.target.detach().requires_grad_(self._wants_grad)

    def has_left(self) -> None:
        """What is queued from now on may have the tensor's memory on the device."""
        if self._leaving is not None:
            self._transfer.wait(self._leaving)
            self._leaving = None

    def start_return(self) -> None:
        """Begins to bring it back; more calls change nothing."""
        self.has_left()
        if self._returning is None:
            target = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._returning = self._transfer.start(target, self._host)
