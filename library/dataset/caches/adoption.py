"""Taking over entries that another program made: what was taken, what was not and why, in one line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset.caches.share import Gather

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Adoption:
    """Counts entries that were taken over (``taken``) and the reasons why others were not, each with an example."""

    def __init__(self) -> None:
        self.taken = 0
        self._refused: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def refuse(self, reason: str, example: Path | str) -> None:
        """``reason`` is read after a number of entries ("3 older than the image"); where it is empty there was nothing to take,
        which need not be told."""
        if reason:
            self._refused[reason] += 1
            self._examples.setdefault(reason, str(example))

    def report(self, what: str, *, gather: Gather | None = None) -> None:
        """One log line; with ``gather`` it tells of all processes, which then call this together."""
        own = (self.taken, self._refused, self._examples)
        parts = [own] if gather is None else gather(own)
        taken = sum(part[0] for part in parts)
        refused: Counter[str] = sum((part[1] for part in parts), Counter())
        examples = {reason: example for part in reversed(parts) for reason, example in part[2].items()}
        reasons = "; ".join(f"{count:,} {reason} ({examples[reason]})" for reason, count in refused.most_common())
        rest = f", {refused.total():,} not: {reasons}" if refused else ""
        logger.info("%s cache: %s taken over%s", what, f"{taken:,}", rest)


def misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why tensors of another program cannot be an entry with these shapes, as a reason for ``Adoption``; None where they can."""
    import torch

    for name, shape in shapes.items():
        tensor, called = tensors.get(name), name.replace("_", " ")
        if tensor is None:
            return f"without {called}"
        if tuple(tensor.shape) != shape:
            return f"with {called} of another shape"
        if not tensor.is_floating_point():
            return f"with {called} that are whole numbers"
        if not bool(torch.isfinite(tensor).all()):
            return f"with {called} that are not finite"
    return None
