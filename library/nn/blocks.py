"""How a model calls its transformer blocks. Whoever trades speed for memory gives the model another way than the plain one."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class BlockRunner(Protocol):
    def __call__(self, number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        """``block(x, *inputs)`` of the block at place ``number``; ``x`` is what the block before returned."""


def run_plainly(number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
    return block(x, *inputs)
