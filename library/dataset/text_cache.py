"""Encoder output of every caption, computed once: kept in memory or in one file per image.

A cache file ``<image file name>.<arch>-text.safetensors`` holds the tensors of each text as ``<text's hash>/<tensor name>``, and
in its metadata ``texts`` (JSON {hash: text}, newest first) and ``captions`` (JSON list: the captions as read that the texts were
made from). A text is what the encoder sees, so caption settings need no ingredients of their own: other settings give other
texts. Texts that belong to no image (the empty caption, sample prompts) share ``atelier.<arch>-prompts.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.dataset.cache_check import TensorCheck
from library.dataset.cache_file import (
    MISSING,
    VALID,
    CacheState,
    SourceHashes,
    Verdict,
    Wanted,
    cache_path,
    check_header,
    clean_left_overs,
    load_cache_tensors,
    make_folder,
    read_cache_tensors,
    unreadable,
    write_cache_file,
)
from library.dataset.cache_share import ROUND_BYTES, Gather, shared
from library.dataset.cache_writer import CacheWriter, FillReport, report_filled, report_stale
from library.dataset.captions import caption_variant, possible_variants
from library.dataset.conditioning import Conditioning
from library.dataset.hot_tensors import HotTensors
from library.dataset.items import Item, TrainingSet
from library.errors import CheckpointError, DatasetError
from library.files.safetensors_file import SafetensorsHeader, read_header

if TYPE_CHECKING:
    from torch import Tensor

MAX_VARIANTS = 32  # per image, unless the user asks for more
EMPTY = ""  # always cached: caption dropout is decided while training, whatever its rate was when the cache was made
KEEP_UNUSED = 8  # valid texts of an image that this run does not use: switching caption settings back and forth stays cheap
KEEP_UNUSED_PROMPTS = 64
HASH_DIGITS = 16
HEADER_BYTES = 1024  # about what a cache file's header takes
CHARACTER_BYTES_PER_TOKEN = 3  # UTF-8, for estimates: rather too few than too many, in any script
CHECKERS = 8

Encode = Callable[[list[str]], Conditioning]  # B captions -> their conditioning
Tensors = dict[str, "Tensor"]  # of one text, as Conditioning.cache_tensors gives them
Read = Callable[[Path, Callable[[str], bool]], Tensors]  # the tensors of a file that a test accepts


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """What encoded text depends on beside the text. ``settings``: token lengths and the like."""

    arch: str
    encoder_fingerprint: str
    dtype: str
    settings: Mapping[str, object] = field(default_factory=dict)
    bytes_per_token: int = 4096  # for estimates only


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    """One cache file: the texts that this run needs of it, and the captions they come from."""

    path: Path
    texts: tuple[str, ...]
    captions: tuple[str, ...]
    keep_unused: int
    about: str  # the image, for messages


def default_variants(training_set: TrainingSet, epochs: int) -> int:
    """How many variants of each caption to cache so that every showing in the run can have its own, at most 32; 1 when no caption
    has a random part."""
    most = 1
    for item in training_set.items:
        most = max(most, min(possible_variants(item, limit=MAX_VARIANTS), item.repeats * epochs))
    return min(most, MAX_VARIANTS)


class TextCache:
    """The encoded captions of a training set in ``variants`` variants each, and ``extra_texts`` (sample prompts).

    ``skip_check`` trusts the files' texts whatever model or settings made them (``--skip_cache_check``). ``conditioning_type``
    is needed by ``load`` only and can be set later, when torch may be imported; ``fill`` learns it from the encoder.
    ``round_bytes``: how much the processes of a run hand over at once when they share a cache in memory.
    """

    def __init__(  # noqa: PLR0913  # the trainer's one call
        self,
        training_set: TrainingSet,
        recipe: TextRecipe,
        *,
        conditioning_type: type[Conditioning] | None = None,
        variants: int = 1,
        extra_texts: tuple[str, ...] = (),
        on_disk: bool,
        cache_dir: Path | None = None,
        skip_check: bool = False,
    ):
        self.recipe, self.on_disk, self.cache_dir, self.skip_check = recipe, on_disk, cache_dir, skip_check
        self.conditioning_type, self.variants = conditioning_type, variants
        self.round_bytes = ROUND_BYTES
        self.tensor_check = TensorCheck()
        self._items = training_set.items
        self._extra_texts = tuple(dict.fromkeys((EMPTY, *extra_texts)))
        self._hot = HotTensors()
        self._memory: dict[str, Tensors] = {}
        self._judged: list[tuple[_File, dict[str, Verdict]]] | None = None

    def state(self) -> CacheState:
        """How much of the cache is there, counted in texts per file (in memory: different texts).

        Reads headers, and the tensors of files that are due (see ``TensorCheck``); needs no torch. The answer is kept until
        ``fill``.
        """
        if self._judged is None:
            self._judged = self._judge(self._files) if self.on_disk else [self._judge_memory()]
        found = self._judged
        verdicts = [(file, text, verdict) for file, texts in found for text, verdict in texts.items()]
        unwritten = [(file, text) for file, text, verdict in verdicts if not verdict.valid]
        bytes_needed = sum(self._bytes(text) for _, text in unwritten)
        if self.on_disk:
            bytes_needed += HEADER_BYTES * len({file.path for file, _ in unwritten})
        return CacheState(
            total=len(verdicts),
            valid=len(verdicts) - len(unwritten),
            missing=sum(verdict.kind == "missing" for _, _, verdict in verdicts),
            stale=_stale(found),
            bytes_needed=bytes_needed,
            in_memory=not self.on_disk,
        )

    def fill(  # noqa: PLR0913  # the trainer's one call
        self,
        encode: Encode,
        *,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
        gather: Gather | None = None,
        progress: bool = True,
    ) -> FillReport:
        """Encodes what is missing, stale or damaged. ``encode`` runs in this thread, writing in others.

        Each text is encoded once, in fixed groups: ``batch_size`` consecutive ones of all texts of the run in the order of the
        training set. A group with a missing member is encoded whole, so that a fill that was interrupted ends with the same
        values as one that was not. Every file is complete or absent, and stays when a later one fails.

        On disk process ``rank`` of ``processes`` makes a contiguous share of the files, and the caller waits for all processes
        before it loads; in memory each encodes its share of the groups and ``gather`` (an all-gather of Python objects) spreads
        them, piece by piece.

        Raises DatasetError for a caption whose encoding is not finite, OutputError for a full disk.
        """
        started = time.monotonic()
        self._hot = HotTensors()  # what was read before may be made again
        self._judged = None
        groups = [self._texts[start : start + batch_size] for start in range(0, len(self._texts), batch_size)]
        bar = partial(_progress_bar, shown=progress and rank == 0)
        if self.on_disk:
            written, reused = self._fill_files(encode, groups, bar=bar, share=_share_of(self._files, rank, processes))
            if rank == 0:
                clean_left_overs(file.path.parent for file in self._files)
        else:
            written, reused = self._fill_memory(encode, groups[rank::processes], bar=bar)
            if processes > 1:
                self._share(groups[rank::processes], gather, processes=processes)
        report = FillReport(written, reused, time.monotonic() - started)
        if rank == 0:
            report_filled("text", report, self._place())
        return report

    def load(self, item: Item, variant: int = 0) -> Conditioning:
        """One caption's conditioning (B = 1). Safe in threads.

        Raises DatasetError for a file damaged since the start, and deletes it so that the next start makes it again.
        """
        return self._load(self.text_of(item, variant), self._path_of(item))

    def load_text(self, text: str) -> Conditioning:
        """The conditioning (B = 1) of the empty caption or of one of ``extra_texts``."""
        return self._load(text, self._prompts_path)

    def text_of(self, item: Item, variant: int = 0) -> str:
        return caption_variant(item, variant)

    def _load(self, text: str, path: Path) -> Conditioning:
        if self.conditioning_type is None:
            raise ValueError("set conditioning_type before anything is loaded from the cache")
        if not self.on_disk:
            return self.conditioning_type.from_cache(self._memory[text])
        tensors = self._hot.get((path, text), lambda: _read_text(path, text, read=load_cache_tensors))
        return self.conditioning_type.from_cache(tensors)

    # what is needed, and where it lies

    def _path_of(self, item: Item) -> Path:
        return cache_path(item.path, f"{self.recipe.arch}-text", self.cache_dir)

    @property
    def _prompts_path(self) -> Path:
        folder = self.cache_dir or self._items[0].path.parent
        return folder / f"atelier.{self.recipe.arch}-prompts.safetensors"

    @cached_property
    def _files(self) -> tuple[_File, ...]:
        """One per image in the order of the training set, whatever the number of datasets that use it; then the prompts."""
        users_of: dict[Path, list[Item]] = {}
        for item in self._items:
            users_of.setdefault(self._path_of(item), []).append(item)
        files = [
            _File(path, _unique(self._texts_of(items)), _unique(item.caption for item in items), KEEP_UNUSED, str(items[0].path))
            for path, items in users_of.items()
        ]
        prompts = _File(self._prompts_path, self._extra_texts, (), KEEP_UNUSED_PROMPTS, "a sample prompt")
        return (*files, prompts)

    def _texts_of(self, items: Iterable[Item]) -> Iterable[str]:
        for item in items:
            for variant in range(self.variants if possible_variants(item, limit=2) > 1 else 1):
                yield self.text_of(item, variant)

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        return _unique(text for file in self._files for text in file.texts)

    @property
    def _ingredients(self) -> dict[str, object]:
        recipe = self.recipe
        return {
            "arch": recipe.arch,
            "model": recipe.encoder_fingerprint,
            "dtype": recipe.dtype,
            "settings": dict(recipe.settings),
        }

    def _bytes(self, text: str) -> int:
        length = len(text.encode("utf-8", errors="surrogatepass"))
        return (length // CHARACTER_BYTES_PER_TOKEN + 2) * self.recipe.bytes_per_token

    def _place(self) -> str:
        if not self.on_disk:
            return "in memory"
        return "beside the images" if self.cache_dir is None else str(self.cache_dir)

    # what is there

    def _judge(self, files: Sequence[_File]) -> list[tuple[_File, dict[str, Verdict]]]:
        with ThreadPoolExecutor(CHECKERS) as pool:
            if not self.skip_check:
                self.tensor_check.choose([file.path for file in files], pool)
            return list(pool.map(lambda file: (file, self._verdicts(file)), files))

    def _judge_memory(self) -> tuple[_File, dict[str, Verdict]]:
        file = _File(Path(), self._texts, (), 0, "")
        return file, {text: VALID if text in self._memory else MISSING for text in self._texts}

    def _verdicts(self, file: _File) -> dict[str, Verdict]:
        """Of each text that the run needs of this file."""
        header, verdict = self._header(file.path)
        if header is None or verdict.kind == "damaged":
            return dict.fromkeys(file.texts, verdict)
        try:
            stored = _stored_texts(header)
            captions = json.loads(header.metadata["captions"])
        except (KeyError, TypeError, ValueError):
            return dict.fromkeys(file.texts, Verdict("damaged", "its description is broken"))
        present = {text for text in file.texts if stored.get(text_hash(text)) == text}
        if self.skip_check and present == set(file.texts):
            return dict.fromkeys(file.texts, VALID)
        if not verdict.valid:
            return dict.fromkeys(file.texts, verdict)
        absent = MISSING if not file.captions else Verdict("stale", _why_absent(file, captions))
        broken = self._broken(header, present)
        return {text: broken.get(text, VALID) if text in present else absent for text in file.texts}

    def _broken(self, header: SafetensorsHeader, texts: Collection[str]) -> dict[str, Verdict]:
        """Those of the file's texts whose tensors are damaged."""
        text_by_hash = {text_hash(text): text for text in texts}
        names = [name for name in header.tensors if name.partition("/")[0] in text_by_hash]
        found = self.tensor_check.broken(header, names)
        return {text_by_hash[name.partition("/")[0]]: Verdict("damaged", reason) for name, reason in found.items()}

    def _header(self, path: Path) -> tuple[SafetensorsHeader | None, Verdict]:
        if not path.is_file():
            return None, MISSING
        try:
            header = read_header(path)
        except CheckpointError as error:
            return None, unreadable(path, error)
        return header, check_header(header, Wanted(ingredients=self._ingredients), hashes=SourceHashes())

    # making what is not there

    def _fill_memory(self, encode: Encode, groups: Sequence[Sequence[str]], *, bar: Callable[..., Any]) -> tuple[int, int]:
        total = sum(len(group) for group in groups)
        todo = [group for group in groups if any(text not in self._memory for text in group)]
        wanted = sum(text not in self._memory for group in todo for text in group)
        with bar(total=wanted) as shown:
            for group in todo:
                for text, tensors in zip(group, self._encode_group(encode, group), strict=True):
                    if text not in self._memory:
                        self._check_finite(text, tensors)
                        self._memory[text] = tensors
                        shown.update(1)
        return wanted, total - wanted

    def _share(self, groups: Sequence[Sequence[str]], gather: Gather | None, *, processes: int) -> None:
        own = {text: self._memory[text] for group in groups for text in group}
        for text, tensors in shared(own, gather, processes=processes, round_bytes=self.round_bytes):
            self._memory.setdefault(text, tensors)

    def _fill_files(
        self, encode: Encode, groups: Sequence[Sequence[str]], *, bar: Callable[..., Any], share: Sequence[_File]
    ) -> tuple[int, int]:
        judged = self._judge(share)
        report_stale("text", _stale(judged))
        gaps = {file: _gaps(file, verdicts) for file, verdicts in judged}
        gaps = {file: texts for file, texts in gaps.items() if texts}
        wanted = sum(len(texts) for texts in gaps.values())
        if gaps:
            if self.cache_dir is not None:
                make_folder(self.cache_dir)
            with bar(total=wanted) as shown:
                self._encode_files(encode, groups, gaps=gaps, on_written=shown.update)
        return wanted, sum(len(file.texts) for file in share) - wanted

    def _encode_files(
        self, encode: Encode, groups: Sequence[Sequence[str]], *, gaps: dict[_File, set[str]], on_written: Callable[[int], object]
    ) -> None:
        """Goes through the texts group by group and writes each file as soon as its last text is there."""
        entries = [text for texts in gaps.values() for text in texts]
        assembly = _Assembly(gaps)
        bytes_each = sum(map(self._bytes, entries)) / len(entries)
        with CacheWriter("texts", total=len(entries), bytes_each=bytes_each, on_written=on_written) as writer:
            for group in groups:
                if not assembly.needs(group):
                    continue
                for text, tensors in zip(group, self._encode_group(encode, group), strict=True):
                    if assembly.needs([text]):
                        self._check_finite(text, tensors)
                    for file, made in assembly.add(text, tensors):
                        writer.submit(partial(self._write, file, made), entries=len(made))

    def _encode_group(self, encode: Encode, texts: Sequence[str]) -> list[Tensors]:
        output = encode(list(texts))
        self.conditioning_type = self.conditioning_type or type(output)
        parts = output.to("cpu").split()
        if len(parts) != len(texts):
            raise ValueError(f"the text encoder gave {len(parts)} results for {len(texts)} texts")
        # clones, no views: a text that is kept must not hold its whole group in memory
        return [{name: tensor.detach().clone() for name, tensor in part.cache_tensors().items()} for part in parts]

    def _write(self, file: _File, made: dict[str, Tensors]) -> None:
        kept = self._kept(file, made)
        texts = {**made, **kept}
        tensors = {f"{text_hash(text)}/{name}": tensor for text, parts in texts.items() for name, tensor in parts.items()}
        details = {
            "texts": json.dumps({text_hash(text): text for text in texts}, ensure_ascii=False),
            "captions": json.dumps(file.captions, ensure_ascii=False),
        }
        write_cache_file(file.path, tensors, ingredients=self._ingredients, details=details)

    def _kept(self, file: _File, made: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """The texts of the old file that stay: those in use, and a few that are not. A damaged one is dropped."""
        header, verdict = self._header(file.path)
        if header is None or not verdict.valid:
            return {}
        stored = [text for text in _stored_texts(header).values() if text not in made]
        unused = [text for text in stored if text not in file.texts][: file.keep_unused]
        return _read_texts(file.path, [text for text in stored if text in file.texts or text in unused])

    def _check_finite(self, text: str, tensors: Tensors) -> None:
        import torch

        bad = [name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        if bad:
            about = next(file.about for file in self._files if text in file.texts)
            raise DatasetError(
                f"the text encoder gives values that are not finite ({', '.join(bad)}) for the text {_shortened(text)} of "
                f"{about}: look for a damaged text encoder file, or try another --mixed_precision"
            )


class _Assembly:
    """Puts encoded texts together to files. Holds a text no longer than a file waits for it."""

    def __init__(self, gaps: Mapping[_File, set[str]]):
        self._waiting = {file: set(texts) for file, texts in gaps.items()}
        self._made: dict[_File, dict[str, Tensors]] = {file: {} for file in gaps}
        self._files_of: dict[str, list[_File]] = {}
        for file, texts in gaps.items():
            for text in texts:
                self._files_of.setdefault(text, []).append(file)

    def needs(self, texts: Iterable[str]) -> bool:
        return any(text in self._files_of for text in texts)

    def add(self, text: str, tensors: Tensors) -> list[tuple[_File, dict[str, Tensors]]]:
        """The files that this text completes."""
        complete = []
        for file in self._files_of.pop(text, []):
            self._made[file][text] = tensors
            self._waiting[file].discard(text)
            if not self._waiting[file]:
                complete.append((file, self._made.pop(file)))
        return complete


def text_hash(text: str) -> str:
    """Names a text inside a cache file. A text from a file's name need not be valid Unicode: each has a hash of its own."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:HASH_DIGITS]


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _share_of(files: Sequence[_File], rank: int, processes: int) -> Sequence[_File]:
    return files[len(files) * rank // processes : len(files) * (rank + 1) // processes]


def _stored_texts(header: SafetensorsHeader) -> dict[str, str]:
    """{hash: text} of the texts whose tensors are in the file."""
    present = {name.partition("/")[0] for name in header.tensors}
    return {key: text for key, text in json.loads(header.metadata["texts"]).items() if key in present}


def _why_absent(file: _File, captions: Sequence[str]) -> str:
    return "caption settings or variants changed" if set(file.captions) <= set(captions) else "caption changed"


def _gaps(file: _File, verdicts: Mapping[str, Verdict]) -> set[str]:
    """The texts to encode. Where a file is written anew anyway, what it keeps is read first: a damaged text is encoded again."""
    gaps = {text for text, verdict in verdicts.items() if not verdict.valid}
    valid = [text for text in verdicts if text not in gaps]
    if gaps and valid:
        gaps |= set(valid) - set(_read_texts(file.path, valid))
    return gaps


def _read_texts(path: Path, texts: Iterable[str]) -> dict[str, Tensors]:
    """The texts that can be read."""
    found: dict[str, Tensors] = {}
    for text in texts:
        with suppress(DatasetError):
            found[text] = _read_text(path, text)
    return found


def _read_text(path: Path, text: str, *, read: Read = read_cache_tensors) -> Tensors:
    start = text_hash(text) + "/"
    tensors = read(path, lambda name: name.startswith(start))
    if not tensors:
        raise DatasetError(f"the cache file {path} has no entry for the text {_shortened(text)}: start again, it will be added")
    return {name[len(start) :]: tensor for name, tensor in tensors.items()}


def _stale(judged: Sequence[tuple[_File, Mapping[str, Verdict]]]) -> tuple[tuple[Path, str], ...]:
    return tuple((f.path, v.line) for f, verdicts in judged for v in verdicts.values() if v.kind in ("stale", "damaged"))


def _progress_bar(*, total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="caching text", unit="text", disable=not shown or total == 0)


def _shortened(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'
