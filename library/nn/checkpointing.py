"""Gradient checkpointing: a block's activations are thrown away and computed again during backward. arXiv 1604.06174."""

from __future__ import annotations

from collections.abc import Callable
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


class LayerCheckpoints:
    """A text encoder with a forward of its own that can checkpoint its layers, by the methods of transformers' models."""

    checkpoints = False

    def checkpointed(self, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``run(*inputs)``, which is one layer, checkpointed where that was asked for and gradients are recorded."""
        if self.checkpoints and torch.is_grad_enabled():
            return checkpoint(run, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return run(*inputs)

    def activation_checkpointing_enable(self, settings: dict[str, Any] | None = None) -> None:
        """Layers are computed again in the backward pass, wherever gradients are recorded; ``settings`` of transformers' method
        of this name have no other meaning here."""
        self.checkpoints = True

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.20
