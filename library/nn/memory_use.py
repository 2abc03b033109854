"""What a model keeps in memory while it is trained, in numbers of values. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Of one forward pass of a batch.

    Of each block: ``kept`` is what its backward pass needs, ``carried`` what it is given by the block before, which is all that
    checkpointing keeps of it. ``outside``: what is needed of layers between blocks, checkpointing or not. ``working``: gradients
    that are there at once while a block goes backward. ``encoders``: weights of the text encoder and of the VAE, where they
    encode at every step; ``encoder_kept`` and ``encoder_carried``: what the backward pass needs of a text encoder that is
    trained, without and with checkpointing.
    """

    kept: tuple[int, ...]
    carried: tuple[int, ...]
    outside: int = 0
    working: int
    encoders: int
    encoder_kept: int = 0
    encoder_carried: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEncoders:
    """``text``, ``vae``: whether these models encode at every step; of the text encoders, whether their weights are in 8 bits and
    whether they are trained."""

    text: bool = False
    vae: bool = False
    text_in_fp8: bool = False
    text_is_trained: bool = False
