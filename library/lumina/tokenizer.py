"""Gemma's tokenizer: where it comes from, captions -> token ids. Needs no torch, except where the weights are a pickle.

A user's own (--gemma2_tokenizer) wins; else it is the one that comes with the weights, as bytes in the file or as a file in the
folder; else google/gemma-2-2b on the hub, whose owner has to let people in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.errors import CheckpointError
from library.files.hub_download import cached_file, fetch_model, is_repo_id
from library.files.open_weights import SafetensorsWeights, ShardedWeights
from library.files.safetensors_file import TensorFile
from library.files.weights_source import WeightsSource
from library.lumina.gemma_layout import SPIECE
from library.text.tokenizer_files import TextLength, load_json_tokenizer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

FLAG = "--gemma2_tokenizer"
HUB_ID = "google/gemma-2-2b"
BOS, BOS_ID, PAD_ID = "<bos>", 2, 0
MARKS_WITHIN = 1024  # SentencePiece puts marks before all that it has learnt
NAMES = MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"  # the first that is there is taken: it loads faster
BYTE_TYPES = ("U8", "I8")
CURE = (
    f"give a Gemma 2 file that carries its tokenizer ({SPIECE}: the one for ComfyUI does), or {FLAG} a folder with "
    f"{MODEL_FILE} or {JSON_FILE}"
)
LICENCE = (
    f"The hub hands {HUB_ID} to those who have accepted Google's licence on its page and are logged in (hf auth login, HF_TOKEN "
    "or --huggingface_token). "
)


@dataclass(frozen=True, slots=True)
class GemmaTokenizerFile:
    """A tokenizer that is there; not loaded. One of ``path`` and ``source`` is set."""

    path: Path | None = None  # of tokenizer.model or tokenizer.json
    source: WeightsSource | None = None  # weights with the tokenizer's bytes
    max_tokens: int = 256  # of a text, <bos> included; the rest is cut off

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path) if self.source is None else f"{SPIECE} in {self.source.path}"

    def content(self) -> bytes:
        """Raises CheckpointError where it cannot be read."""
        if self.source is not None:
            return _tensor_bytes(self.source)
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"the tokenizer {self.path} cannot be read: {error.strerror}") from error

    def fingerprint(self) -> str:
        """Of the content: caches are kept when the same tokenizer comes from elsewhere."""
        return hashlib.sha256(self.content()).hexdigest()[:32]

    def load(self) -> GemmaTokenizer:
        """Raises CheckpointError for what is no tokenizer of Gemma's."""
        if self.path is not None and self.path.suffix == ".json":
            return GemmaTokenizer(JsonPieces(self.path), self.max_tokens)
        return GemmaTokenizer(SentencePieces(self.content(), self.name), self.max_tokens)


def find_gemma_tokenizer(
    given: str | None, weights: WeightsSource | None, *, max_tokens: int, token: str | None = None
) -> GemmaTokenizerFile:
    """``given``: a folder, a file, or OWNER/NAME on the hub. ``weights``: Gemma's, as --gemma2 or the checkpoint has them.

    Raises CheckpointError where there is none, and where the hub does not hand it out.
    """
    if given:
        return GemmaTokenizerFile(path=_given_file(given, token), max_tokens=max_tokens)
    if weights is not None and _spiece_key(weights) is not None:
        return GemmaTokenizerFile(source=weights, max_tokens=max_tokens)
    beside = _file_beside(Path(weights.path)) if weights is not None else None
    return GemmaTokenizerFile(path=beside or _hub_file(HUB_ID, token), max_tokens=max_tokens)


def _file_beside(folder: Path) -> Path | None:
    """In the folder of the weights, or in the one for tokenizers of a model in the layout of diffusers."""
    if not folder.is_dir():
        return None
    whole = folder.resolve()
    return _file_in(folder) or (_file_in(whole.parent / "tokenizer") if whole.name == "text_encoder" else None)


def _given_file(value: str, token: str | None) -> Path:
    path = Path(value)
    if path.is_file():
        return path
    if path.is_dir():
        if (found := _file_in(path)) is not None:
            return found
        raise CheckpointError(f"{FLAG} {path} has neither {MODEL_FILE} nor {JSON_FILE}: give the folder that has")
    if not is_repo_id(value):
        raise CheckpointError(f"{FLAG} {path} does not exist: give a folder with {MODEL_FILE} or {JSON_FILE}, or leave it out")
    return _hub_file(value, token, flag=FLAG)


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def _hub_file(repo_id: str, token: str | None, *, flag: str = "") -> Path:
    """From the hub's cache without asking, if it is there: a published tokenizer does not change. ``flag``: that names it."""
    for name in NAMES:
        if (kept := cached_file(repo_id, name)) is not None:
            return kept
    try:
        folder = fetch_model(repo_id, _wanted, parts=(), flag=flag, token=token, what=f"{MODEL_FILE} or {JSON_FILE}")
    except CheckpointError as error:
        why = "" if flag else "Gemma 2's tokenizer is not with its weights, and "
        licence = LICENCE if repo_id == HUB_ID else ""
        raise CheckpointError(*(f"{why}{problem}. {licence}Or {CURE}" for problem in error.problems)) from error
    found = _file_in(folder)
    assert found is not None  # fetch_model saw to it
    return found


def _wanted(names: Sequence[str]) -> Iterator[str]:
    yield from [name for name in NAMES if name in names][:1]


# ---------------------------------------------------------------- bytes in the weights


def _spiece_key(source: WeightsSource) -> str | None:
    """Under any prefix; Gemma's, where another text encoder has one too."""
    keys = [key for key in source.shapes if key == SPIECE or key.endswith(f".{SPIECE}")]
    return min(keys, key=lambda key: ("gemma" not in key, len(key), key), default=None)


def _tensor_bytes(source: WeightsSource) -> bytes:
    key = _spiece_key(source)
    assert key is not None
    if isinstance(source, ShardedWeights):
        return _tensor_bytes(next(shard for shard in source.shards if key in shard.shapes))
    if isinstance(source, SafetensorsWeights):
        with TensorFile(source.path) as file:
            info = file.info(key)
            if info.dtype not in BYTE_TYPES:
                wanted = " or ".join(BYTE_TYPES)
                raise CheckpointError(
                    f"{source.path}: {key} is stored as {info.dtype}, where bytes ({wanted}) are wanted; {CURE}"
                )
            return bytes(file.read([info])[0])
    ((_, tensor),) = source.tensors([key])
    return tensor.numpy().tobytes()


# ---------------------------------------------------------------- the tokenizer


class Pieces(Protocol):
    """Text -> ids without a mark at either end, by whichever package reads the file."""

    size: int  # of the vocabulary

    def ids(self, text: str) -> list[int]: ...

    def characters(self, text: str, ids: Sequence[int], kept: int) -> int:
        """How many characters of ``text`` (which is ``ids``) are whole within the first ``kept`` of them."""


@dataclass(frozen=True, slots=True, eq=False)
class GemmaTokenizer:
    """``max_tokens``: of a text, <bos> included; longer ones lose their end."""

    pieces: Pieces
    max_tokens: int

    def ids(self, text: str) -> list[int]:
        """<bos> and the text, without an end mark; '' is <bos> alone.

        The names of Gemma's marks in a text (<bos>, <eos>, <pad>, <unk>) become those marks, as in Hugging Face's tokenizer.
        """
        return [BOS_ID, *self.pieces.ids(text)][: self.max_tokens]

    def length(self, text: str) -> TextLength:
        """Before it is cut, <bos> included."""
        ids = self.pieces.ids(text)
        if len(ids) < self.max_tokens:
            return TextLength(len(ids) + 1, None)
        return TextLength(len(ids) + 1, self.pieces.characters(text, ids, self.max_tokens - 1))

    def check_vocabulary(self, embeddings: int) -> None:
        """Raises CheckpointError when it makes ids beyond the encoder's ``embeddings`` rows."""
        if self.pieces.size > embeddings:
            raise CheckpointError(
                f"the tokenizer has {self.pieces.size:,} tokens, Gemma 2 only {embeddings:,}: {FLAG} must name the encoder's own"
            )


class SentencePieces:
    """``tokenizer.model``"""

    def __init__(self, content: bytes, name: str):
        self.model = _sentencepiece_model(content, name)
        self.size: int = self.model.vocab_size()
        if self.model.bos_id() != BOS_ID:
            raise CheckpointError(
                f"the tokenizer {name} is not Gemma's: its <bos> is {self.model.bos_id()}, not {BOS_ID}; {CURE}"
            )
        first = range(min(self.size, MARKS_WITHIN))
        marks = [number for number in first if self.model.is_control(number) or self.model.is_unknown(number)]
        self.marks = {self.model.id_to_piece(number): number for number in marks}
        self.mark = re.compile("(" + "|".join(map(re.escape, sorted(self.marks, key=len, reverse=True))) + ")")

    def ids(self, text: str) -> list[int]:
        found: list[int] = []
        for part in self.mark.split(text) if "<" in text else [text]:
            found.extend([self.marks[part]] if part in self.marks else self.model.encode(part))
        return found

    def characters(self, text: str, ids: Sequence[int], kept: int) -> int:
        # pieces say again what they were made of; bytes of a character that is cut in two say nothing
        data = b"".join(self._bytes(number) for number in ids[:kept])
        return len(data.decode("utf-8", "ignore"))

    def _bytes(self, number: int) -> bytes:
        piece = self.model.id_to_piece(number)
        return bytes([int(piece[1:-1], 16)]) if self.model.is_byte(number) else piece.encode("utf-8")


def _sentencepiece_model(content: bytes, name: str) -> SentencePieceProcessor:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise CheckpointError(f"the tokenizer {name} needs the package sentencepiece: pip install sentencepiece") from error
    model = SentencePieceProcessor()
    try:
        is_loaded = bool(content) and model.LoadFromSerializedProto(content)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _damaged(name) from error
    if not is_loaded:
        raise _damaged(name)
    return model


def _damaged(name: str) -> CheckpointError:
    return CheckpointError(f"the tokenizer {name} cannot be loaded: its bytes are no SentencePiece model; {CURE}")


class JsonPieces:
    """``tokenizer.json``"""

    def __init__(self, path: Path):
        self.tokenizer = load_json_tokenizer(path)
        self.size: int = self.tokenizer.get_vocab_size()
        if (found := self.tokenizer.token_to_id(BOS)) != BOS_ID:
            raise CheckpointError(f"the tokenizer {path} is not Gemma's: its <bos> is {found}, not {BOS_ID}; {CURE}")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def characters(self, text: str, ids: Sequence[int], kept: int) -> int:
        offsets: Any = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets[kept][0]
