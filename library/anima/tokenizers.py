"""The two tokenizers of Anima's text side: captions -> token ids for Qwen3 and for the LLM adapter's T5 embedding.

Both come with the project (configs/); a user's own folders win. The light ``tokenizers`` package reads them: the same ids as
transformers' classes, without that import. Needs no torch.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from library.anima.layout import CONTEXT_ROWS
from library.anima.text_layout import has_tokenizer
from library.errors import CheckpointError
from library.text.tokenizer_files import BUNDLED_T5, CONFIGS, TextLength, load_json_tokenizer, load_t5, text_length

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLED_QWEN = CONFIGS / "qwen3_06b"
T5_FLAG = "--t5_tokenizer_path"
QWEN_PAD = "<|endoftext|>"
# how Qwen splits text before merging bytes; only for folders that have vocab.json and merges.txt but no tokenizer.json
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class TokenIds(NamedTuple):
    """The ids of one caption, cut to the limits, without padding. ``t5`` ends in ``</s>``; ``qwen`` is empty for ''."""

    qwen: list[int]
    t5: list[int]


class TextLengths(NamedTuple):
    """``t5`` counts ``</s>``."""

    qwen: TextLength
    t5: TextLength


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Where the tokenizers lie and where captions are cut. Checked, but not loaded: that takes most of a second."""

    qwen_dir: Path = BUNDLED_QWEN
    t5_dir: Path = BUNDLED_T5
    qwen_max: int = CONTEXT_ROWS  # tokens
    t5_max: int = CONTEXT_ROWS

    def load(self) -> AnimaTokenizers:
        return AnimaTokenizers(load_qwen(self.qwen_dir), load_t5(self.t5_dir), self.qwen_max, self.t5_max)


def find_tokenizers(
    qwen3: str | Path | None = None,
    t5_path: str | Path | None = None,
    *,
    qwen_max: int = CONTEXT_ROWS,
    t5_max: int = CONTEXT_ROWS,
) -> TokenizerFiles:
    """The tokenizers of a run: Qwen's from the encoder's folder ``qwen3`` if it is one and has one, T5's from ``t5_path`` if
    given, else bundled. Whether there is an encoder at ``qwen3`` is not asked.

    Raises CheckpointError when ``t5_path`` is not a folder (or file in one) with a T5 tokenizer.
    """
    qwen_dir = Path(qwen3) if qwen3 else BUNDLED_QWEN
    if not has_tokenizer(qwen_dir):
        qwen_dir = BUNDLED_QWEN
    if not t5_path:
        return TokenizerFiles(qwen_dir, BUNDLED_T5, qwen_max, t5_max)
    folder = Path(t5_path)
    if not folder.exists():
        raise CheckpointError(f"{T5_FLAG} {folder} does not exist: give a folder with tokenizer.json, or leave the flag out")
    folder = folder.parent if folder.is_file() else folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise CheckpointError(
            f"{T5_FLAG} {folder} has no tokenizer.json and no spiece.model; leave the flag out to use the bundled one"
        )
    return TokenizerFiles(qwen_dir, folder, qwen_max, t5_max)


@dataclass(frozen=True, slots=True, eq=False)
class AnimaTokenizers:
    """Both tokenizers, loaded. ``qwen_max`` and ``t5_max`` are in tokens; longer captions lose their end, T5's keeps ``</s>``."""

    qwen: Tokenizer
    t5: Any  # a Tokenizer, or a SentencePieceTokenizer with the same ``encode``
    qwen_max: int = CONTEXT_ROWS
    t5_max: int = CONTEXT_ROWS

    @classmethod
    def bundled(cls, *, qwen_max: int = CONTEXT_ROWS, t5_max: int = CONTEXT_ROWS) -> AnimaTokenizers:
        return TokenizerFiles(qwen_max=qwen_max, t5_max=t5_max).load()

    def ids(self, caption: str) -> TokenIds:
        """No chat template, no BOS; '' is no Qwen token at all and a single ``</s>`` for T5."""
        qwen, t5 = self.qwen.encode(caption).ids, self.t5.encode(caption).ids
        if len(t5) > self.t5_max:
            t5 = [*t5[: self.t5_max - 1], t5[-1]]
        return TokenIds(qwen[: self.qwen_max], t5)

    def lengths(self, caption: str) -> TextLengths:
        """How long the caption is, and where ``ids`` cuts it."""
        return TextLengths(
            text_length(self.qwen, caption, kept=self.qwen_max, room=self.qwen_max),
            text_length(self.t5, caption, kept=self.t5_max - 1, room=self.t5_max),
        )

    @property
    def qwen_pad_id(self) -> int:
        """What fills the places behind a caption; the model never sees them."""
        return self.qwen.token_to_id(QWEN_PAD) or 0

    def check_vocabulary(self, embeddings: int) -> None:
        """Raises CheckpointError when the Qwen tokenizer makes ids beyond the encoder's ``embeddings`` rows."""
        tokens = self.qwen.get_vocab_size()
        if tokens > embeddings:
            raise CheckpointError(f"the Qwen3 tokenizer has {tokens:,} tokens, the encoder only {embeddings:,}: "
                                  "put its own tokenizer.json into its folder and give --qwen3 that folder")  # fmt: skip


def load_qwen(folder: Path) -> Tokenizer:
    """``tokenizer.json`` (plain or gzipped), else ``vocab.json`` with ``merges.txt``. Raises CheckpointError naming the file."""
    from tokenizers import Tokenizer

    compressed = folder / "tokenizer.json.gz"
    if (folder / "tokenizer.json").is_file():
        return load_json_tokenizer(folder / "tokenizer.json")
    if compressed.is_file():
        return Tokenizer.from_str(gzip.decompress(compressed.read_bytes()).decode("utf-8"))
    if has_tokenizer(folder):
        return _qwen_from_merges(folder)
    raise CheckpointError(f"{folder} has no tokenizer.json and no vocab.json with merges.txt")


def _qwen_from_merges(folder: Path) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        config_path = folder / "tokenizer_config.json"
        own = json.loads(config_path.read_bytes()).get("added_tokens_decoder") if config_path.is_file() else None
        added = own or json.loads((BUNDLED_QWEN / "tokenizer_config.json").read_bytes())["added_tokens_decoder"]
        tokens = [AddedToken(**{k: v for k, v in added[number].items()}) for number in sorted(added, key=int)]
    except Exception as error:  # noqa: BLE001  # the package raises plain Exception for a damaged file
        raise CheckpointError(f"cannot load the tokenizer in {folder} (vocab.json, merges.txt): {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.add_tokens(tokens)
    return tokenizer
