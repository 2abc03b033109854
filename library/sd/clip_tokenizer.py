"""CLIP's tokenizers: captions -> rows of 77 token ids. Needs no torch.

All published CLIP text encoders share one table of byte pairs, which comes with the project (configs/clip_bpe). They differ in
what fills a row behind the text and in which characters are special. The light ``tokenizers`` package does the merging.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from library.dataset.token_use import TokenUse
from library.errors import OptionError
from library.sd.prompt_weights import parse_weights
from library.text.tokenizer_files import longest_start

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MERGES = Path(__file__).resolve().parents[2] / "configs" / "clip_bpe" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
WORD_END = "</w>"
PIECE = 75  # tokens of text in a row
ROW = PIECE + 2  # with the start and end mark
PROMPT_PIECES = 3  # rows that a prompt of Stable Diffusion 1 and 2 may take
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # CLIP, arXiv 2103.00020: words, single digits, the rest
UNTOUCHED = re.compile(r"[\t\n -%'-~]*")  # by ftfy: ASCII without "&", which may begin an HTML entity


@dataclass(frozen=True, slots=True)
class TokenizerKind:
    """What differs between the tokenizers of published models."""

    encoder: str  # as people name it
    pad_id: int  # fills a row behind the end mark
    special: tuple[tuple[str, int], ...] = ()  # texts that are one token wherever they stand


CLIP_L = TokenizerKind("CLIP-L", END_ID)  # Stable Diffusion 1, and the first of SDXL
OPEN_CLIP_H = TokenizerKind("OpenCLIP-H", 0, (("!", 0),))  # Stable Diffusion 2, whose tokenizer file declares "!" special
OPEN_CLIP_G = TokenizerKind("OpenCLIP-G", 0)  # the second of SDXL


class TokenRows(NamedTuple):
    """A text as an encoder gets it: rows of 77 ids, marks and padding included, and how strongly each token counts."""

    ids: list[list[int]]
    weights: list[list[float]]


class ClipTokenizer:
    """One kind of tokenizer; several may share the table ``bpe``."""

    def __init__(self, kind: TokenizerKind, bpe: Tokenizer):
        self.kind = kind
        self._bpe = bpe
        self._special = {START: START_ID, END: END_ID, **dict(kind.special)}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def ids(self, text: str) -> list[int]:
        """Of the whole text, without marks and padding."""
        parts = self._split.split(text) if text else []
        return [number for part in parts if part for number in self._part_ids(part)]

    def _part_ids(self, part: str) -> list[int]:
        special = self._special.get(part)
        return self._bpe.encode(cleaned(part)).ids if special is None else [special]

    def weighted_ids(self, text: str, *, weighted: bool) -> tuple[list[int], list[float]]:
        """The ids and the weight of each; all 1 unless ``weighted``, else what the brackets say."""
        ids: list[int] = []
        weights: list[float] = []
        for part, weight in parse_weights(text) if weighted else [(text, 1.0)]:
            more = self.ids(part)
            ids += more
            weights += [weight] * len(more)
        return ids, weights

    def rows(self, text: str, *, tokens: int = PIECE, weighted: bool = False) -> TokenRows:
        """A caption for training: ``tokens`` / 75 rows, whatever its length; what is longer loses its end."""
        ids, weights = self.weighted_ids(text, weighted=weighted)
        ids, weights = ids[:tokens], weights[:tokens]
        padding = tokens - len(ids)
        line = [START_ID, *ids, END_ID, *[self.kind.pad_id] * padding]
        strengths = [1.0, *weights, *[1.0] * (padding + 1)]
        if tokens == PIECE:
            return TokenRows([line], [strengths])
        starts = range(1, tokens, PIECE)
        return TokenRows(
            [self._row(line[start : start + PIECE], last=line[-1]) for start in starts],
            [[1.0, *strengths[start : start + PIECE], 1.0] for start in starts],
        )

    def _row(self, piece: list[int], *, last: int) -> list[int]:
        """One of several rows of a caption; ``last`` is the last id of the caption with its padding."""
        pad = self.kind.pad_id
        row = [START_ID, *piece, last]
        if pad != END_ID:  # whoever pads with something else needs an end mark in each row
            if row[-2] not in (END_ID, pad):
                row[-1] = END_ID
            if row[1] == pad:
                row[1] = END_ID
        return row

    def prompt_rows(self, text: str) -> TokenRows:
        """A prompt for a picture: as many rows as it needs, at most three, each with its own marks; weights are always read."""
        ids, weights = self.weighted_ids(text, weighted=True)
        count = min(max(-(-len(ids) // PIECE), 1), PROMPT_PIECES)
        ids += [END_ID] * (count * PIECE - len(ids))
        weights += [1.0] * (count * PIECE - len(weights))
        starts = range(0, count * PIECE, PIECE)
        return TokenRows(
            [[START_ID, *ids[start : start + PIECE], END_ID] for start in starts],
            [[1.0, *weights[start : start + PIECE], 1.0] for start in starts],
        )

    def count(self, text: str, *, tokens: int = PIECE, weighted: bool = False) -> TokenUse:
        """How long a caption is for rows of ``tokens`` in all; marks do not count."""

        def length(start: str) -> int:
            return len(self.weighted_ids(start, weighted=weighted)[0])

        found = length(text)
        cut_at = longest_start(text, length, tokens) if found > tokens else None
        return TokenUse(self.kind.encoder, found, tokens, cut_at)


def load_tokenizers(*kinds: TokenizerKind) -> tuple[ClipTokenizer, ...]:
    """One of each kind; the table is read once."""
    bpe = load_bpe()
    return tuple(ClipTokenizer(kind, bpe) for kind in kinds)


def load_bpe() -> Tokenizer:
    """CLIP's byte pair encoding, without special tokens; texts must be ``cleaned``."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    letters = _byte_letters()
    words = [*letters, *(letter + WORD_END for letter in letters), *(first + second for first, second in merges), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END))
    split = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return bpe


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order of CLIP's vocabulary: bytes that are printable in Latin-1 stand for
    themselves and come first, the others for the letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def cleaned(text: str) -> str:
    """As CLIP was trained: repaired (curly quotes, HTML entities, broken encodings), single spaces, lower case."""
    return " ".join((text if UNTOUCHED.fullmatch(text) else _repaired(text)).split()).lower()


def _repaired(text: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise OptionError("captions with characters beyond ASCII need the package ftfy, as CLIP's tokenizer does: "
                          "pip install ftfy") from error  # fmt: skip
    return fix_text(text)


def stacked(texts: Sequence[TokenRows]) -> TokenRows:
    """The rows of several texts below each other."""
    return TokenRows([row for text in texts for row in text.ids], [row for text in texts for row in text.weights])
