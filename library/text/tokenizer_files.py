"""Tokenizers that several architectures share: what their files hold, T5's that comes with the project (configs/t5_old), and what
becomes of a text that is too long. Needs no torch.

The light ``tokenizers`` package reads them: the same ids as transformers' classes, without that import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from library.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BUNDLED_T5 = CONFIGS / "t5_old"  # 32,100 pieces, of T5 v1.1 of every size
T5_END = "</s>"
LONG_WORD = 24  # characters


def load_json_tokenizer(path: Path) -> Tokenizer:
    """A ``tokenizer.json``. Raises CheckpointError naming the file."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # the package raises plain Exception for a damaged file
        raise CheckpointError(f"cannot load the tokenizer {path}: {error}; download it again") from error
    tokenizer.no_truncation()  # a file may carry limits of its own; ours are the flags'
    tokenizer.no_padding()
    return tokenizer


def load_t5(folder: Path = BUNDLED_T5) -> Any:
    """``tokenizer.json``, else ``spiece.model``. Raises CheckpointError naming the file, or the package that is missing."""
    if not (folder / "tokenizer.json").is_file():
        return SentencePieceTokenizer(folder / "spiece.model")
    tokenizer = load_json_tokenizer(folder / "tokenizer.json")
    if tokenizer.encode("").tokens != [T5_END]:
        raise CheckpointError(f"{folder / 'tokenizer.json'} is not a T5 tokenizer: it does not end a text in {T5_END}")
    return tokenizer


class SentencePieceTokenizer:
    """A T5 ``spiece.model`` through transformers, with the two calls of a ``Tokenizer`` that are used here."""

    def __init__(self, path: Path):
        try:
            import sentencepiece  # noqa: F401  # transformers' own message about it is a traceback
            from transformers import T5Tokenizer
        except ImportError as error:
            raise CheckpointError(f"{path} needs the package {error.name}: pip install sentencepiece, or give a folder with "
                                  "tokenizer.json") from error  # fmt: skip
        try:
            self._tokenizer = T5Tokenizer.from_pretrained(str(path.parent), local_files_only=True, legacy=True)
        except Exception as error:  # noqa: BLE001  # a damaged model file raises RuntimeError, OSError, TypeError or ValueError
            raise CheckpointError(f"cannot load the tokenizer {path}: {error}") from error

    def encode(self, caption: str) -> SentencePieceIds:
        return SentencePieceIds(self._tokenizer(caption).input_ids)

    def get_vocab_size(self) -> int:
        return len(self._tokenizer)


class SentencePieceIds(NamedTuple):
    ids: list[int]


# ---------------------------------------------------------------- lengths


class TextLength(NamedTuple):
    """A caption before it is cut: ``tokens`` in all, and of how many characters something is left (None: nothing is cut)."""

    tokens: int
    cut_at: int | None


def text_length(tokenizer: Any, caption: str, *, kept: int, room: int) -> TextLength:
    """Of a caption of more than ``room`` tokens the first ``kept`` stay. A character that is split between a token that stays and
    one that goes does not count as seen."""
    encoding = tokenizer.encode(caption)
    if len(encoding.ids) <= room:
        return TextLength(len(encoding.ids), None)
    offsets = getattr(encoding, "offsets", None)
    if offsets:
        return TextLength(len(encoding.ids), offsets[kept][0])
    # without its end mark, as kept does not count it
    return TextLength(len(encoding.ids), longest_start(caption, lambda start: len(tokenizer.encode(start).ids) - 1, kept))


def longest_start(text: str, length: Callable[[str], int], room: int) -> int:
    """How many characters of ``text`` come out as at most ``room`` tokens, for tokenizers without offsets."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(text[:middle]) <= room else (low, middle - 1)
    # a part of a word can take more tokens than the word
    longer = range(min(low + LONG_WORD, len(text)), low, -1)
    return next((end for end in longer if length(text[:end]) <= room), low)


def padded(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows padded on the right to ``length`` (default: the longest, at least 1), and masks with True at the tokens."""
    length = max(1, *map(len, rows)) if length is None else length
    ids = [[*row, *[pad_id] * (length - len(row))] for row in rows]
    return ids, [[place < len(row) for place in range(length)] for row in rows]
