"""The trained weights around an update: what a bad step must not change, and what a diverged run goes back to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SNAPSHOT_EVERY = 10  # steps; a copy of the adapter's weights on their device


class TrainedWeights:
    """Keeps the weights from before each update, and now and then a snapshot.

    A snapshot counts as good once a forward pass through its weights gave a finite loss.
    """

    def __init__(self, weights: Sequence[Tensor]):
        self._weights = [weight.detach() for weight in weights]  # shares memory, takes no part in autograd
        self._before = [weight.clone() for weight in self._weights]
        self._good = [weight.clone() for weight in self._weights]
        self._candidate: list[Tensor] | None = None
        self._candidate_step = -1

    def remember(self, step: int) -> None:
        """Called before update number ``step`` changes the weights."""
        torch._foreach_copy_(self._before, self._weights)
        if self._candidate is None and step % SNAPSHOT_EVERY == 0:
            self._candidate, self._candidate_step = [weight.clone() for weight in self._weights], step

    def keep_if(self, finite: Tensor) -> None:
        """Takes the update back where ``finite`` () is false. Decided on the device: the host waits for nothing."""
        if finite.device.type == "cpu":
            if not finite:
                torch._foreach_copy_(self._weights, self._before)
            return
        for weight, before in zip(self._weights, self._before, strict=True):
            torch.where(finite, weight, before, out=weight)

    def learned(self, step: int, finite: bool) -> None:
        """The loss of update number ``step``, computed with the weights from before it, is known."""
        if self._candidate is not None and step == self._candidate_step:
            if finite:
                self._good = self._candidate
            self._candidate = None

    def are_finite(self) -> bool:
        """Waits for the device: for use before saving, not at every step."""
        return all(bool(torch.isfinite(weight).all()) for weight in self._weights)

    def restore_good(self) -> None:
        torch._foreach_copy_(self._weights, self._good)
