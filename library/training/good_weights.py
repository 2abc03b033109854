"""The last weights that are known to give a finite loss, kept so that a diverged run loses nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SNAPSHOT_EVERY = 10  # steps; a copy of the adapter's weights on their device


class GoodWeights:
    """A snapshot becomes the good one once a forward pass through its weights gave a finite loss."""

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = list(parameters)
        self._good = self._copy()
        self._candidate: list[Tensor] | None = None
        self._candidate_step = -1

    def before_update(self, step: int) -> None:
        """Called before update number ``step`` changes the weights."""
        if self._candidate is None and step % SNAPSHOT_EVERY == 0:
            self._candidate, self._candidate_step = self._copy(), step

    def learned(self, step: int, finite: bool) -> None:
        """The loss of update number ``step``, computed with the weights from before it, is known."""
        if self._candidate is not None and step == self._candidate_step:
            if finite:
                self._good = self._candidate
            self._candidate = None

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self._parameters, self._good)

    @torch.no_grad()
    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]
