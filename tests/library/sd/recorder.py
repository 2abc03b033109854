"""What tests of text encoders watch: operations that wait for the device, and what a backward pass keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def checkpointing_options(checkpointing: str | None) -> Any:
    """As much of the options as arrange_text_encoders reads."""
    return SimpleNamespace(memory=SimpleNamespace(checkpointing=checkpointing))
