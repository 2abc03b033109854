"""Steps that come out not finite: told, counted, and after several in a row the end."""

from __future__ import annotations

import logging
import math

from library.training.running.meters import StepNumbers

logger = logging.getLogger("library.training")

MAX_SKIPPED_STEPS = 5  # in a row; then the run has diverged
WARNED_OVERFLOWS, MAX_OVERFLOWS = 10, 50  # in a row; the loss scale of fp16 halves at each, so these are far below any use


class DivergenceGuard:
    """``scales_losses``: fp16, where a finite loss whose gradient overflows is part of finding the scale."""

    def __init__(self, *, scales_losses: bool):
        self._scales_losses = scales_losses
        self.skipped = 0
        self.overflows = 0

    def has_diverged(self, numbers: StepNumbers) -> bool:
        """Called with each step's numbers in order."""
        if numbers.finite:
            self.skipped = self.overflows = 0
            return False
        if self._scales_losses and math.isfinite(numbers.loss):
            self.overflows += 1
            if self.overflows == WARNED_OVERFLOWS:
                logger.warning("step %d: %d steps in a row overflowed in fp16 and were skipped", numbers.step, self.overflows)
            return self.overflows >= MAX_OVERFLOWS
        self.skipped += 1
        logger.warning("step %d: the loss or its gradient is not finite; the step was skipped", numbers.step)
        return self.skipped >= MAX_SKIPPED_STEPS

    @property
    def ends_in_skipped_steps(self) -> bool:
        """Asked when a run is over: whether its last steps were skipped, more of them than a search for fp16's scale takes."""
        return self.skipped >= MAX_SKIPPED_STEPS or self.overflows >= WARNED_OVERFLOWS
