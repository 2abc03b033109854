"""Random numbers as pure functions of what they are for.

Nothing here keeps state: a number depends on the parts that name it (seed, epoch, step, item, purpose) and on nothing
else, so it does not matter how many workers ran, what was logged in between, or how often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_BITS = 63  # torch.Generator takes a signed 64-bit seed
FLOAT_BITS = 53  # that a float holds exactly


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, on their order and on nothing else."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    # surrogatepass: names of files need not be valid text, and each must give its own number
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def uniform(*parts: int | str) -> float:
    """One number in [0, 1): a third of the time of a generator of its own."""
    return (derive_seed(*parts) >> (SEED_BITS - FLOAT_BITS)) / 2**FLOAT_BITS


def python_random(*parts: int | str) -> random.Random:
    """A ``random.Random`` of its own for captions, orders and other choices made in Python."""
    return random.Random(derive_seed(*parts))


def torch_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A ``torch.Generator`` of its own on ``device``."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


def seed_default_generators(seed: int, device: torch.device) -> None:
    """Seeds what draws without a generator of its own on the CPU and on ``device`` (dropout inside networks).

    ``torch.manual_seed`` does the same for every kind of device there is, which takes longer than a small step's own work.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
