"""How much of a text a text encoder takes in: what is said about captions and prompts before they are used. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from library.dataset.captions import caption_variant
from library.dataset.folders import printable
from library.dataset.items import Item, TrainingSet


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


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """``tokens`` bytes of text fit into every encoder of an architecture. ``cure``: what to do with captions that do not."""

    tokens: int
    cure: str


TokenCounter = Callable[[str], Sequence[TokenUse]]  # a text as the encoder gets it -> one use for each tokenizer
TokenLengths = Callable[[str], Iterable[tuple[int, int]]]  # the same, but only its tokens and how many of them count
LOST_SHOWN = 60  # characters
COUNTED = 100  # captions: the longest, and as many of the others
WEIGHT = re.compile(r"(?<!\\)\([^()]*[^()\\]:[+-]?\d?\.\d+\)")  # (red:1.3); a ratio such as (16:9) has no point


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


def cut_caption_warnings(training_set: TrainingSet, load: Callable[[], TokenLengths], limit: TokenLimit) -> Iterator[str]:
    """At most one: how many captions lose their end, by variant 0 of each. ``load`` is called only where one may be too long.

    A large set must not start later for it: the longest captions are counted, and if all of them are cut, a sample of the rest.
    """
    long = _longer_than(limit.tokens, training_set.all_items)
    if not long:
        return
    lengths = load()
    longest, others = long[:COUNTED], long[COUNTED:]
    cut = [found for item in longest if (found := _cut(item, lengths)) is not None]
    if not cut:
        return
    count = f"{len(cut):,}" if not others else f"at least {len(cut):,}"
    if others and len(cut) == len(longest):
        sample = others[:: -(-len(others) // COUNTED)]
        share = sum(_cut(item, lengths) is not None for item in sample) / len(sample)
        count = _about(len(longest) + share * len(others))
    item, tokens, limited = max(cut, key=lambda found: found[1])
    yield (
        f"{count} of {len(training_set.all_items):,} captions {'is' if count == '1' else 'are'} longer than the {limited} tokens "
        f"that the text encoder takes, and cut (such as that of {printable(item.path.name)}, {tokens:,} tokens): {limit.cure}; "
        "--show_captions shows what is lost"
    )


def weight_warnings(training_set: TrainingSet) -> Iterator[str]:
    """At most one: weights as prompts have them, for a run that takes captions as they stand."""
    items = training_set.all_items
    weighted = [(item, found[0]) for item in items if ":" in item.caption and (found := WEIGHT.search(item.caption))]
    if weighted:
        item, mark = weighted[0]
        yield (
            f"{len(weighted):,} of {len(items):,} captions {'has' if len(weighted) == 1 else 'have'} weights (such as {mark!r} "
            f"in that of {printable(item.path.name)}), which are trained as they stand, brackets and numbers and all: add "
            "--weighted_captions to have them followed"
        )


def _longer_than(limit: int, items: Iterable[Item]) -> list[Item]:
    """Those whose captions have more bytes, each token being one at least; the longest first."""
    sizes: list[tuple[int, Item]] = []
    for item in items:
        parts = (item.caption, item.subset.caption_prefix or "", item.subset.caption_suffix or "")
        size = sum(len(part) if part.isascii() else len(part.encode("utf-8", "replace")) for part in parts)
        if size > limit:
            sizes.append((size, item))
    return [item for _, item in sorted(sizes, key=lambda found: -found[0])]


def _cut(item: Item, lengths: TokenLengths) -> tuple[Item, int, int] | None:
    """The item, its tokens and the limit, where the caption is longer than that."""
    over = [(tokens, limit) for tokens, limit in lengths(caption_variant(item, 0)) if tokens > limit]
    return (item, *max(over)) if over else None


def _about(number: float) -> str:
    """To two digits."""
    whole = round(number)
    return f"about {round(whole, 2 - len(str(whole))):,}"
