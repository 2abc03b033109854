"""Encoder output of every caption, computed once: kept in memory or in one file per image (see ``text_files``)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from library.dataset.caches.adoption import Adoption, misfit
from library.dataset.caches.cache_file import (
    VALID,
    CacheState,
    Verdict,
    clean_left_overs,
    make_folder,
    write_cache_file,
)
from library.dataset.caches.check import CacheCheck
from library.dataset.caches.notes import CacheNotes
from library.dataset.caches.rows import Column, MemoryEntry, RowReader, RowSource, stacked
from library.dataset.caches.share import ROUND_BYTES, Gather, shared
from library.dataset.caches.text_files import (
    EMPTY,
    PROMPT_MARK,
    Tensors,
    TextFile,
    TextFileCheck,
    TextFiles,
    TextRecipe,
    TextVerdicts,
    Users,
    read_texts,
    shortened,
    stored_texts,
    tensors_of_text,
    text_hash,
)
from library.dataset.caches.writer import CacheWriter, FillReport, progress_bar, report_filled, report_stale
from library.dataset.captions import caption_variant, possible_variants
from library.dataset.conditioning import Conditioning
from library.dataset.items import Item, TrainingSet
from library.dataset.prefetch import prefetch
from library.errors import CheckpointError, DatasetError
from library.files.safetensors_file import TensorFile

__all__ = ["EMPTY", "TextCache", "TextRecipe", "default_variants", "text_hash"]

MAX_VARIANTS = 32  # per image, unless the user asks for more
HEADER_BYTES = 1024  # about what a cache file's header takes
ADOPTERS = 2  # threads that read entries of another program

Encode = Callable[[list[str]], Conditioning]  # B captions, or one text with a PROMPT_MARK -> their conditioning
# An item and a text of it -> the text's tensors as another program made them, or why there are none
ReadForeign = Callable[[Item, str], "Tensors | str"]
Judged = tuple[TextFile, Mapping[str, Verdict]]


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
        self._files = TextFiles(training_set, recipe, variants=variants, extra_texts=extra_texts, cache_dir=cache_dir)
        self._file_check = TextFileCheck(self._files, skip_check=skip_check)
        self._notes = CacheNotes(f"{recipe.arch}-text")
        self.check: CacheCheck[Users, Verdict | TextVerdicts] = CacheCheck(
            self._notes, ask=self._files.asked, open_file=self._file_check.open_file
        )
        self._rows = RowReader()
        self._memory: dict[str, Tensors] = {}
        self._state: CacheState | None = None

    def state(self, *, refresh: bool = False, again: bool = False) -> CacheState:
        """How much of the cache is there, counted in texts per file (in memory: different texts).

        Reads the headers and tensors of files that earlier starts have not checked, or that have changed since (see
        ``cache_check``); needs no torch. ``refresh`` notes what was found valid, so that the next start need not look again;
        without it nothing is written. The answer is kept until ``fill``, or until it is asked for ``again``.
        """
        if again:
            self._forget()
        if self._state is None:
            self._state = self._state_on_disk() if self.on_disk else self._state_in_memory()
        if refresh:
            self._save_notes()
        return self._state

    @property
    def contents(self) -> str:
        """What ``state`` counts, in words: ``"6 captions, 2 texts of sample pictures and the empty one"``."""
        captions, prompts = self.state().total - len(self._files.extra_texts), len(self._files.extra_texts) - 1
        of_pictures = f", {prompts} text{'s' if prompts > 1 else ''} of sample pictures" if prompts else ""
        return f"{captions} caption{'s' if captions != 1 else ''}{of_pictures} and the empty one"

    def adopt(
        self, read: ReadForeign, *, rank: int = 0, processes: int = 1, gather: Gather | None = None, progress: bool = True
    ) -> None:
        """Takes over what another program made of the texts that are missing, stale or damaged.

        ``read`` is asked for each such text with an item that it belongs to (not for sample prompts and the empty text). What
        it gives becomes an ordinary entry; a text says why there is nothing. One log line tells how many texts were taken over
        and why others were not. Process ``rank`` of ``processes`` sees to a contiguous share of the images; caches in memory
        are shared through ``gather``, with which the log line also tells of all processes.
        """
        share = [users for users in _share_of(self._files.all, rank, processes) if users]
        gaps = {file: found for file, found in self._all_gaps(share).items() if found}
        total = sum(len(texts) for texts in gaps.values())
        if gaps and self.on_disk and self.cache_dir is not None:
            make_folder(self.cache_dir)
        adoption = Adoption()
        with (
            progress_bar("taking over text", "text", total=total, shown=progress and rank == 0) as bar,
            CacheWriter("texts", total=total, bytes_each=HEADER_BYTES, on_written=bar.update) as writer,
            prefetch(partial(self._read_foreign, read), gaps.items(), workers=ADOPTERS, depth=4 * ADOPTERS) as parts,
        ):
            for (file, texts), (made, refused) in zip(gaps.items(), parts, strict=True):
                for reason in refused:
                    adoption.refuse(reason, file.about)
                bar.update(len(texts) - len(made))
                adoption.taken += len(made)
                if made:
                    writer.submit(partial(self._keep, file, made), entries=len(made))
        self._forget()
        self._save_notes()
        if not self.on_disk and processes > 1:
            self._share(self._memory, gather, processes=processes)
        adoption.report("text", gather=gather if processes > 1 else None)

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
        self._forget()
        all_texts = self._files.texts()
        captions = [text for text in all_texts if not text.startswith(PROMPT_MARK)]
        groups = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
        groups += [[text] for text in all_texts if text.startswith(PROMPT_MARK)]
        bar = partial(progress_bar, "caching text", "text", shown=progress and rank == 0)
        if self.on_disk:
            written, reused = self._fill_files(encode, groups, bar=bar, share=_share_of(self._files.all, rank, processes))
            if rank == 0:
                clean_left_overs({Path(self._files.file(users).path).parent for users in self._files.all})
        else:
            written, reused = self._fill_memory(encode, groups[rank::processes], bar=bar)
            if processes > 1:
                own = [text for group in groups[rank::processes] for text in group]
                self._share(own, gather, processes=processes)
        report = FillReport(written, reused, time.monotonic() - started)
        together = gather if processes > 1 else None
        if rank == 0 or together is not None:
            report_filled("text", report, self._place(), gather=together)
        return report

    def load(self, item: Item, variant: int = 0) -> Conditioning:
        """The conditioning (B = 1) of a caption, as ``load_batch``."""
        return self.load_batch([(item, self.text_of(item, variant))])

    def load_text(self, text: str, *, kind: type[Conditioning] | None = None) -> Conditioning:
        """The conditioning (B = 1) of the empty caption or of one of ``extra_texts``; ``kind``: what it is, if not what captions
        are."""
        return self.load_batch([(None, text)], kind=kind)

    def text_of(self, item: Item, variant: int = 0) -> str:
        return caption_variant(item, variant)

    def load_batch(self, texts: Sequence[tuple[Item | None, str]], *, kind: type[Conditioning] | None = None) -> Conditioning:
        """The conditioning of B texts, each with the item that has it as a caption; None for the empty caption and for
        ``extra_texts``. Safe in threads.

        Raises DatasetError for a file damaged since the start, and deletes it so that the next start makes it again.
        """
        kind = kind or self.conditioning_type
        if kind is None:
            raise ValueError("set conditioning_type before anything is loaded from the cache")
        columns = self._rows.load(self._sources(texts)) if self.on_disk else self._from_memory(texts)
        tensors = {name: column.tensor for name, column in columns.items()}
        return kind.from_cache(tensors, {name: column.lengths for name, column in columns.items()})

    def _sources(self, texts: Sequence[tuple[Item | None, str]]) -> list[RowSource]:
        paths = [self._files.prompts_path if item is None else self._files.path_of(item) for item, _ in texts]
        named = [(path, text) for path, (_, text) in zip(paths, texts, strict=True)]
        recipe = None if self.skip_check else self._files.recipe_mark
        return [RowSource(path, (path, text), tensors_of_text(path, text), recipe) for path, text in named]

    def _from_memory(self, texts: Sequence[tuple[Item | None, str]]) -> dict[str, Column]:
        return stacked([MemoryEntry(shortened(text), self._memory[text]) for _, text in texts])

    # what is there

    def _state_on_disk(self) -> CacheState:
        total = valid = missing = bytes_needed = 0
        stale: list[tuple[Path, str]] = []
        for users, found in zip(self._files.all, self._judge(self._files.all), strict=True):
            if found == VALID:
                count = self._files.count(users)
                total, valid = total + count, valid + count
                continue
            file, verdicts = self._by_text(users, found)
            unwritten = [text for text, verdict in verdicts.items() if not verdict.valid]
            total, valid = total + len(verdicts), valid + len(verdicts) - len(unwritten)
            missing += sum(verdict.kind == "missing" for verdict in verdicts.values())
            bytes_needed += HEADER_BYTES + sum(map(self._files.text_bytes, unwritten))
            stale += _stale([(file, verdicts)])
        return CacheState(total=total, valid=valid, missing=missing, stale=tuple(stale), bytes_needed=bytes_needed)

    def _state_in_memory(self) -> CacheState:
        texts = self._files.texts()
        absent = [text for text in texts if text not in self._memory]
        return CacheState(
            total=len(texts),
            valid=len(texts) - len(absent),
            missing=len(absent),
            stale=(),
            bytes_needed=sum(map(self._files.text_bytes, absent)),
            in_memory=True,
        )

    def _judge(self, files: Sequence[Users]) -> list[Verdict | TextVerdicts]:
        found = self.check.judge(files)
        self._notes.release()
        return found

    def _by_text(self, users: Users, found: Verdict | TextVerdicts) -> Judged:
        file = self._files.file(users)
        return file, found.by_text if isinstance(found, TextVerdicts) else dict.fromkeys(file.texts, found)

    def _place(self) -> str:
        if not self.on_disk:
            return "in memory"
        return "beside the images" if self.cache_dir is None else str(self.cache_dir)

    def _forget(self) -> None:
        """What was read or judged before may be made again."""
        self._rows = RowReader()
        self._state = None

    def _save_notes(self) -> None:
        if not self.skip_check:  # what was not checked is not noted
            self._notes.save()

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

    def _share(self, texts: Iterable[str], gather: Gather | None, *, processes: int) -> None:
        own = {text: self._memory[text] for text in texts}
        for text, tensors in shared(own, gather, processes=processes, round_bytes=self.round_bytes):
            self._memory.setdefault(text, tensors)

    def _fill_files(
        self, encode: Encode, groups: Sequence[Sequence[str]], *, bar: Callable[..., Any], share: Sequence[Users]
    ) -> tuple[int, int]:
        judged = [self._by_text(users, found) for users, found in zip(share, self._judge(share), strict=True)]
        report_stale("text", _stale(judged))
        gaps = {file: texts for file, verdicts in judged if (texts := self._gaps(file, verdicts))}
        wanted = sum(len(texts) for texts in gaps.values())
        if gaps:
            if self.cache_dir is not None:
                make_folder(self.cache_dir)
            try:
                with bar(total=wanted) as shown:
                    self._encode_files(encode, groups, gaps=gaps, on_written=shown.update)
            finally:
                self._save_notes()
        return wanted, sum(len(file.texts) for file, _ in judged) - wanted

    def _encode_files(
        self,
        encode: Encode,
        groups: Sequence[Sequence[str]],
        *,
        gaps: dict[TextFile, set[str]],
        on_written: Callable[[int], object],
    ) -> None:
        """Goes through the texts group by group and writes each file as soon as its last text is there."""
        entries = [text for texts in gaps.values() for text in texts]
        assembly = _Assembly(gaps)
        bytes_each = sum(map(self._files.text_bytes, entries)) / len(entries)
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

    def _write(self, file: TextFile, made: dict[str, Tensors]) -> None:
        texts = {**made, **self._kept(file, made)}
        tensors = {f"{text_hash(text)}/{name}": tensor for text, parts in texts.items() for name, tensor in parts.items()}
        details = {
            "texts": json.dumps({text_hash(text): text for text in texts}, ensure_ascii=False),
            "captions": json.dumps(file.captions, ensure_ascii=False),
        }
        written = write_cache_file(Path(file.path), tensors, ingredients=self._files.ingredients, details=details)
        if set(file.texts) <= set(texts):
            self.check.note_written(self._files.asked(file.items), (), written=written)

    def _gaps(self, file: TextFile, verdicts: Mapping[str, Verdict]) -> set[str]:
        """The texts to encode. Where a file is written anew anyway, what it keeps is read first: a damaged text is encoded
        again."""
        gaps = {text for text, verdict in verdicts.items() if not verdict.valid}
        valid = [text for text in verdicts if text not in gaps]
        if gaps and valid:
            gaps |= set(valid) - set(read_texts(file.path, valid, recipe=self._files.recipe_mark))
        return gaps

    def _kept(self, file: TextFile, made: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """The texts of the old file that stay: those in use, and a few that are not. A damaged one is dropped."""
        try:
            with TensorFile(file.path) as opened:
                if not self._files.open_header(opened).valid:
                    return {}
                stored = [text for text in stored_texts(opened).values() if text not in made]
        except (CheckpointError, AttributeError, KeyError, TypeError, ValueError):  # missing, or damaged
            return {}
        unused = [text for text in stored if text not in file.texts][: file.keep_unused]
        return read_texts(
            file.path, [text for text in stored if text in file.texts or text in unused], recipe=self._files.recipe_mark
        )

    # what another program made

    def _all_gaps(self, share: Sequence[Users]) -> dict[TextFile, list[str]]:
        """The texts of each file that are not there; in memory each text once."""
        if self.on_disk:
            judged = [self._by_text(users, found) for users, found in zip(share, self._judge(share), strict=True)]
            return {file: [text for text, verdict in texts.items() if not verdict.valid] for file, texts in judged}
        files = [self._files.file(users) for users in share]
        first = {text: file for file in reversed(files) for text in file.texts if text not in self._memory}
        return {file: [text for text in file.texts if first.get(text) is file] for file in files}

    def _read_foreign(self, read: ReadForeign, gap: tuple[TextFile, list[str]]) -> tuple[dict[str, Tensors], list[str]]:
        """The texts of a file that were found and fit, and why the others are not there."""
        file, texts = gap
        made: dict[str, Tensors] = {}
        refused = []
        for text in texts:
            found = read(self._files.item_of(file.items, text), text)
            found = found if isinstance(found, str) else self._fitting(found)
            if isinstance(found, str):
                refused.append(found)
            else:
                made[text] = found
        return made, refused

    def _fitting(self, tensors: Tensors) -> Tensors | str:
        """The tensors as an entry has them, or why they cannot be one."""
        import torch

        dtype = getattr(torch, self.recipe.dtype)
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in cast.items() if tensor.is_floating_point()}
        return misfit(cast, shapes) or cast

    def _keep(self, file: TextFile, made: dict[str, Tensors]) -> None:
        if self.on_disk:
            self._write(file, made)
        else:
            self._memory.update(made)

    # what is wrong

    def _check_finite(self, text: str, tensors: Tensors) -> None:
        import torch

        bad = [name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        if bad:
            about = next(file.about for file in map(self._files.file, self._files.all) if text in file.texts)
            raise DatasetError(
                f"the text encoder gives values that are not finite ({', '.join(bad)}) for the text {shortened(text)} of "
                f"{about}: look for a damaged text encoder file, or try another --mixed_precision"
            )


class _Assembly:
    """Puts encoded texts together to files. Holds a text no longer than a file waits for it."""

    def __init__(self, gaps: Mapping[TextFile, set[str]]):
        self._waiting = {file: set(texts) for file, texts in gaps.items()}
        self._made: dict[TextFile, dict[str, Tensors]] = {file: {} for file in gaps}
        self._files_of: dict[str, list[TextFile]] = {}
        for file, texts in gaps.items():
            for text in texts:
                self._files_of.setdefault(text, []).append(file)

    def needs(self, texts: Iterable[str]) -> bool:
        return any(text in self._files_of for text in texts)

    def add(self, text: str, tensors: Tensors) -> list[tuple[TextFile, dict[str, Tensors]]]:
        """The files that this text completes."""
        complete = []
        for file in self._files_of.pop(text, []):
            self._made[file][text] = tensors
            self._waiting[file].discard(text)
            if not self._waiting[file]:
                complete.append((file, self._made.pop(file)))
        return complete


def _share_of(files: Sequence[Users], rank: int, processes: int) -> Sequence[Users]:
    return files[len(files) * rank // processes : len(files) * (rank + 1) // processes]


def _stale(judged: Iterable[Judged]) -> list[tuple[Path, str]]:
    return [(Path(f.path), v.line) for f, verdicts in judged for v in verdicts.values() if v.kind in ("stale", "damaged")]
