"""How much of a text a text encoder takes in: what is said about captions and prompts before they are used. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
LOST_SHOWN = 60  # characters


def cut_texts(texts: Iterable[str], load: Callable[[], TokenCounter], *, limit: int) -> Iterator[tuple[str, TokenUse]]:
    """The texts that lose their end, each with its use by the encoder that sees least of it.

    ``load`` makes the counter, which takes a while: only for texts of more than ``limit`` bytes, as each token is one at least.
    """
    long = [text for text in dict.fromkeys(texts) if len(text.encode("utf-8", "replace")) > limit]
    if not long:
        return
    count_tokens = load()
    for text in long:
        cut = [(use.cut_at, use) for use in count_tokens(text) if use.cut_at is not None]
        if cut:
            yield text, min(cut, key=lambda place: place[0])[1]


def lost_text(text: str, use: TokenUse) -> str:
    """What a text that is cut loses, in words that end a sentence about it."""
    lost = " ".join(text[use.cut_at :].split())
    shown = lost if len(lost) <= LOST_SHOWN else f"{lost[:LOST_SHOWN]}..."
    return f"has {use.tokens:,} tokens, of which {use.encoder} takes {use.limit}: cut off is {shown!r}"
