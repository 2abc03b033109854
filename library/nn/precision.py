"""Models that compute in the number format of their own weights, whatever goes on around them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class OwnPrecision:
    """A text encoder that takes no part in autocast unless it is told to: what a frozen one gives is then the same beside others
    that are trained, which need autocast, as when a cache is made."""

    takes_autocast = False  # True: a network on it is trained

    def precision(self, x: Tensor) -> AbstractContextManager[object]:
        """To compute in, with tensors on the device of ``x``."""
        return nullcontext() if self.takes_autocast else torch.autocast(x.device.type, enabled=False)
