"""What a model keeps in memory while it is trained, in numbers of values. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Of one forward pass of a batch. ``kept``: what the backward pass of one block needs; ``carried``: what a block hands to the
    next, all that checkpointing keeps of it; ``working``: gradients that are there at once while a block goes backward;
    ``encoders``: weights of the text encoder and of the VAE, where they encode at every step; ``encoder_kept`` and
    ``encoder_carried``: what the backward pass needs of a text encoder that is trained, without and with checkpointing."""

    blocks: int
    kept: int
    carried: int
    working: int
    encoders: int
    encoder_kept: int = 0
    encoder_carried: int = 0
