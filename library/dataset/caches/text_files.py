"""Which encoded texts a training set needs, in which cache files they lie, and what such a file holds. Torch-free.

A cache file ``<image file name>.<arch>-text.safetensors`` holds the tensors of each text as ``<text's hash>/<tensor name>``, and
in its metadata ``texts`` (JSON {hash: text}, newest first) and ``captions`` (JSON list: the captions as read that the texts were
made from). A text is what the encoder sees, so caption settings need no ingredients of their own: other settings give other
texts. Texts that belong to no image (the empty caption, sample prompts) share ``atelier.<arch>-prompts.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset.caches.cache_file import (
    BROKEN_DESCRIPTION,
    VALID,
    Pick,
    Verdict,
    Wanted,
    broken_tensors,
    check_header,
    recipe_mark,
    unreadable,
)
from library.dataset.caches.check import Asked, Found
from library.dataset.caches.names import SUFFIX, CacheNames
from library.dataset.caches.rows import read_row
from library.dataset.captions import caption_variant, possible_variants
from library.dataset.image_records import SourceHashes
from library.dataset.items import Item, TrainingSet
from library.errors import CheckpointError, DatasetError
from library.files.safetensors_file import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

EMPTY = ""  # always cached: caption dropout is decided while training, whatever its rate was when the cache was made
PROMPT_MARK = "\x1e"  # before a text that is encoded as a sample prompt, where that is not how captions are
# Valid texts of a file that this run does not use, at least: another run may be training on them, and switching caption settings
# back and forth stays cheap. As many as the run itself needs where that is more: the other one may need as many.
KEEP_UNUSED = 64
HASH_DIGITS = 16
KEY_DIGITS = 12
CHARACTER_BYTES_PER_TOKEN = 3  # UTF-8, for estimates: rather too few than too many, in any script

Tensors = dict[str, "Tensor"]  # of one text, as Conditioning.cache_tensors gives them


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """What encoded text depends on beside the text. ``settings``: token lengths and the like."""

    arch: str
    encoder_fingerprint: str
    dtype: str
    settings: Mapping[str, object] = field(default_factory=dict)
    bytes_per_token: int = 4096  # for estimates only


@dataclass(frozen=True, slots=True, eq=False)
class TextFile:
    """One cache file: the texts that this run needs of it, and the captions they come from."""

    path: str
    texts: tuple[str, ...]
    captions: tuple[str, ...]
    items: tuple[Item, ...]  # that use it; none where it holds the prompts

    @property
    def keep_unused(self) -> int:
        return max(KEEP_UNUSED, len(self.texts))

    @property
    def about(self) -> str:
        """For messages."""
        return str(self.items[0].path) if self.items else "a sample prompt"


Users = tuple[Item, ...]  # items of one image; the empty tuple stands for the prompts


class TextFiles:
    """The cache files of a training set. Holds the items that share each; names and texts are computed. Safe in threads."""

    def __init__(
        self, training_set: TrainingSet, recipe: TextRecipe, *, variants: int, extra_texts: Sequence[str], cache_dir: Path | None
    ):
        items = training_set.all_items
        self.recipe, self.variants = recipe, variants
        self.extra_texts = unique((EMPTY, *extra_texts))
        self.prompts_path = str((cache_dir or items[0].path.parent) / f"atelier.{recipe.arch}-prompts{SUFFIX}")
        self._trained = len(training_set.items)
        self._names = CacheNames(cache_dir)
        self.all: tuple[Users, ...] = (*self._by_image(items), ())

    def file(self, users: Users) -> TextFile:
        if not users:
            return TextFile(self.prompts_path, self.extra_texts, (), ())
        captions = unique(item.caption for item in users)
        return TextFile(self.path_of(users[0]), self._texts_of(users), captions, users)

    def path_of(self, item: Item) -> str:
        return self._names.path(item.path, f"{self.recipe.arch}-text")

    def texts(self) -> tuple[str, ...]:
        """All that is needed, each once, in the order of the training set."""
        return unique(text for users in self.all for text in self.file(users).texts)

    def count(self, users: Users) -> int:
        """How many texts its file needs."""
        return 1 if len(users) == 1 and self._variants_of(users[0]) == 1 else len(self.file(users).texts)

    def item_of(self, users: Users, text: str) -> Item:
        """The one that a text belongs to."""
        return next((item for item in users if text in self._texts_of((item,))), users[0])

    def asked(self, users: Users) -> Asked:
        file = self.file(users)
        # a text from a file's name need not be valid Unicode
        wanted = "\x1f".join((self._ingredients_text, *file.texts)).encode("utf-8", errors="surrogatepass")
        return Asked(file.path, hashlib.sha256(wanted).hexdigest()[:KEY_DIGITS])

    @cached_property
    def ingredients(self) -> dict[str, object]:
        recipe = self.recipe
        wanted = {
            "arch": recipe.arch,
            "model": recipe.encoder_fingerprint,
            "dtype": recipe.dtype,
            "settings": dict(recipe.settings),
        }
        return json.loads(json.dumps(wanted))  # as they come back from a file: lists for tuples

    @cached_property
    def recipe_mark(self) -> str:
        return recipe_mark(self.ingredients)

    def text_bytes(self, text: str) -> int:
        """About what the tensors of a text take."""
        length = len(text.encode("utf-8", errors="surrogatepass"))
        return (length // CHARACTER_BYTES_PER_TOKEN + 2) * self.recipe.bytes_per_token

    def open_header(self, file: TensorFile) -> Verdict:
        file.tensors()
        return check_header(file, Wanted(ingredients=self.ingredients), identify=SourceHashes().identity)

    @cached_property
    def _ingredients_text(self) -> str:
        return json.dumps(self.ingredients, sort_keys=True)

    def _by_image(self, items: Iterable[Item]) -> Iterator[Users]:
        """One per image in the order of the training set, whatever the number of datasets that use it."""
        users_of: dict[str, Users] = {}
        for item in items:
            name = self._names.one_name(item.path)
            users_of[name] = (*users_of.get(name, ()), item)
        yield from users_of.values()

    def _texts_of(self, items: Users) -> tuple[str, ...]:
        if len(items) == 1 and self._variants_of(items[0]) == 1:
            return (caption_variant(items[0], 0),)
        return unique(caption_variant(item, variant) for item in items for variant in range(self._variants_of(item)))

    def _variants_of(self, item: Item) -> int:
        """Images that validate are always shown with the first."""
        if self.variants == 1 or item.index >= self._trained:
            return 1
        return self.variants if possible_variants(item, limit=2) > 1 else 1


@dataclass(frozen=True, slots=True, eq=False)
class TextVerdicts:
    """What is to be said of each text of a file that is not valid as a whole."""

    by_text: Mapping[str, Verdict]


class TextFileCheck:
    """Judges files that must be opened. ``skip_check``: whatever model or settings made them, their texts count."""

    def __init__(self, files: TextFiles, *, skip_check: bool):
        self._files, self._skip_check = files, skip_check

    def open_file(self, users: Users, found: Found) -> Verdict | TextVerdicts:
        return self.judge(self._files.file(users), read_whole=found.read_whole)

    def judge(self, file: TextFile, *, read_whole: bool) -> Verdict | TextVerdicts:
        """One verdict on the whole file, else one on each of its texts."""
        try:
            with TensorFile(file.path) as opened:
                verdict = self._files.open_header(opened)
                return self._judge_texts(file, opened, verdict, read_whole=read_whole)
        except CheckpointError as error:
            return unreadable(file.path, error)

    def _judge_texts(self, file: TextFile, opened: TensorFile, verdict: Verdict, *, read_whole: bool) -> Verdict | TextVerdicts:
        if verdict.kind == "damaged":
            return verdict
        try:
            stored = stored_texts(opened)
            captions = json.loads(opened.metadata["captions"])
        except (AttributeError, KeyError, TypeError, ValueError):
            return Verdict("damaged", BROKEN_DESCRIPTION)
        present = {text for text in file.texts if stored.get(text_hash(text)) == text}
        if self._skip_check and present == set(file.texts):
            return VALID
        if not verdict.valid:
            return verdict
        absent = Verdict("stale", _why_absent(file, captions)) if file.captions else Verdict("missing")
        broken = _broken(opened, present) if read_whole else {}
        verdicts = {text: broken.get(text, VALID) if text in present else absent for text in file.texts}
        return VALID if all(found.valid for found in verdicts.values()) else TextVerdicts(verdicts)


def _broken(file: TensorFile, texts: Iterable[str]) -> dict[str, Verdict]:
    """Those of the file's texts whose tensors are damaged."""
    text_by_hash = {text_hash(text): text for text in texts}
    names = [name for name in file.names() if name.partition("/")[0] in text_by_hash]
    found = broken_tensors(file, names)
    return {text_by_hash[name.partition("/")[0]]: Verdict("damaged", reason) for name, reason in found.items()}


def text_hash(text: str) -> str:
    """Names a text inside a cache file. A text from a file's name need not be valid Unicode: each has a hash of its own."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:HASH_DIGITS]


def unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def stored_texts(file: TensorFile) -> dict[str, str]:
    """{hash: text} of the texts whose tensors are in the file."""
    present = {name.partition("/")[0] for name in file.names()}
    return {key: text for key, text in json.loads(file.metadata["texts"]).items() if key in present}


def _why_absent(file: TextFile, captions: Sequence[str]) -> str:
    return "caption settings or variants changed" if set(file.captions) <= set(captions) else "caption changed"


def read_texts(path: str, texts: Iterable[str], *, recipe: str) -> dict[str, Tensors]:
    """The texts that can be read; none where another run has put a file of its own there."""
    found: dict[str, Tensors] = {}
    for text in texts:
        with suppress(DatasetError):
            found[text] = read_row(path, tensors_of_text(path, text), recipe=recipe)
    return found


def tensors_of_text(path: str, text: str) -> Pick:
    """Picks the tensors of a text, by the names that the conditioning gives them."""

    def pick(stored: Collection[str]) -> Mapping[str, str]:
        start = text_hash(text) + "/"
        found = {name[len(start) :]: name for name in stored if name.startswith(start)}
        if not found:
            raise DatasetError(
                f"the cache file {path} has no entry for the text {shortened(text)}: start again, it will be added. If another "
                "run with other captions works on this folder at the same time, give each a --cache_dir of its own"
            )
        return found

    return pick


def shortened(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'
