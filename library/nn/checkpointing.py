"""Gradient checkpointing: a block's activations are thrown away and computed again during backward. arXiv 1604.06174."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_checkpointed(number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
    """``block(x, *inputs)``, checkpointed wherever gradients are recorded, in training and evaluation mode alike.

    The recomputation repeats the random numbers of torch's global generators, so dropout inside the block is the same twice.
    A ``BlockRunner`` (library/nn/blocks.py).
    """
    if torch.is_grad_enabled():
        return checkpoint(block, x, *inputs, use_reentrant=False)  # type: ignore[return-value]
    return block(x, *inputs)
