"""Which devices this machine has."""

from __future__ import annotations

import torch

from library.errors import OptionError

KINDS = ("cuda", "xpu", "mps")  # the best first; cpu is everywhere


def best_device() -> torch.device:
    return torch.device(next((kind for kind in KINDS if device_count(kind)), "cpu"))


def existing_device(name: str, *, flag: str) -> torch.device:
    """The device of this name. Raises OptionError, which names ``flag``, for one that is not there."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = device_count(device.type)
    if not count:
        best = best_device().type
        there = "cpu" if best == "cpu" else f"{best} and cpu"
        raise OptionError(f"{flag} {name}: this PyTorch ({torch.__version__}) finds no such device; there is {there}")
    if device.index is not None and device.index >= count:
        last = f" to {device.type}:{count - 1}" if count > 1 else " alone"
        raise OptionError(f"{flag} {name}: there is no such device; of this kind there is {device.type}:0{last}")
    return device


def device_count(kind: str) -> int:
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0
