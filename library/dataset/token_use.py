"""How much of a text a text encoder takes in: what is said about captions before anything is trained. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenUse:
    """What one tokenizer of an architecture makes of one text.

    ``tokens`` counts the whole text, the tokenizer's own end mark included, ``limit`` those that the encoder takes. ``cut_at``:
    the number of characters of the text that the encoder still sees; None where nothing is cut.
    """

    encoder: str  # as people name it: "Qwen3", "T5"
    tokens: int
    limit: int
    cut_at: int | None


TokenCounter = Callable[[str], Sequence[TokenUse]]  # a text as the encoder gets it -> one use for each tokenizer
