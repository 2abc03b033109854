"""The three tokenizers of SD3: captions -> rows of ids for CLIP-L, CLIP-G and T5. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from library.dataset.token_use import TokenUse
from library.sd.clip_tokenizer import CLIP_L, OPEN_CLIP_G, PIECE, ClipTokenizer, load_tokenizers
from library.text.tokenizer_files import load_t5, text_length

T5_TOKENS = 256  # of a caption by default, end mark included
T5_PAD = 0
T5 = "T5"  # as people name it


class T5Row(NamedTuple):
    """A caption as T5 gets it: ``ids`` of the full length, of which the first ``used`` are tokens."""

    ids: list[int]
    used: int


@dataclass(frozen=True, slots=True, eq=False)
class T5Tokenizer:
    """``tokens``: the length of every row; a longer caption loses its end, the end mark stays."""

    pieces: Any  # a Tokenizer
    tokens: int = T5_TOKENS

    def row(self, text: str) -> T5Row:
        ids = self.pieces.encode(text).ids
        if len(ids) > self.tokens:
            ids = [*ids[: self.tokens - 1], ids[-1]]
        return T5Row([*ids, *[T5_PAD] * (self.tokens - len(ids))], len(ids))

    def length(self, text: str) -> int:
        return len(self.pieces.encode(text).ids)

    def count(self, text: str) -> TokenUse:
        """The end mark counts."""
        found = text_length(self.pieces, text, kept=self.tokens - 1, room=self.tokens)
        return TokenUse(T5, found.tokens, self.tokens, found.cut_at)


@dataclass(frozen=True, slots=True, eq=False)
class Sd3Tokenizers:
    """``t5`` is None where there is no such encoder."""

    clip_l: ClipTokenizer
    clip_g: ClipTokenizer
    t5: T5Tokenizer | None

    def counts(self, text: str) -> Sequence[TokenUse]:
        """How much of a text each encoder takes in: a ``TokenCounter``."""
        clips = [tokenizer.count(text) for tokenizer in (self.clip_l, self.clip_g)]
        return clips if self.t5 is None else [*clips, self.t5.count(text)]

    def lengths(self, text: str) -> list[tuple[int, int]]:
        """The same as (tokens, how many count), without the search for the place of the cut: ``TokenLengths``."""
        found = [(len(self.clip_l.ids(text)), PIECE)]  # CLIP-G has the same table
        return found if self.t5 is None else [*found, (self.t5.length(text), self.t5.tokens)]


def load_sd3_tokenizers(*, t5_tokens: int | None = T5_TOKENS) -> Sd3Tokenizers:
    """``t5_tokens``: the length of T5's rows; None: no T5."""
    clip_l, clip_g = load_tokenizers(CLIP_L, OPEN_CLIP_G)
    return Sd3Tokenizers(clip_l, clip_g, None if t5_tokens is None else T5Tokenizer(load_t5(), t5_tokens))
