"""How a model calls its transformer blocks, and how many of them may wait in host memory. Needs no torch.

Whoever trades speed for memory gives the model another way than the plain one: library/nn/checkpointing.py, library/memory/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from library.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

PLACES_NEEDED = 2  # one block computes while the next one arrives


class BlockRunner(Protocol):
    def __call__(self, number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        """``block(x, *inputs)`` of the block at place ``number``; ``x`` is what the block before returned."""


def run_plainly(number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
    return block(x, *inputs)


def swap_problem(blocks_to_swap: int | None, blocks: int) -> str | None:
    """Why a model with that many blocks cannot do with ``blocks_to_swap``; None where it can."""
    limit = max(blocks - PLACES_NEEDED, 0)
    if not blocks_to_swap or blocks_to_swap <= limit:
        return None
    cure = f"give at most {limit}" if limit else "these are too few to swap any; drop the flag"
    return f"--blocks_to_swap is {blocks_to_swap}, but this model has {blocks} blocks: {cure}"


def check_block_swap(options: Any, blocks: int) -> None:
    """Raises OptionError where a model with that many blocks cannot do with --blocks_to_swap, in scripts that have that flag."""
    if problem := swap_problem(getattr(getattr(options, "memory", None), "blocks_to_swap", None), blocks):
        raise OptionError(problem)
