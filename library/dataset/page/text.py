"""What the page says, in short, for a terminal; and captions as the encoder will get them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from library.dataset.folders import printable
from library.dataset.items import Item, TrainingSet
from library.dataset.page.facts import DatasetFacts, Facts, counted, cut_away
from library.dataset.page.showings import CaptionExample, Showings
from library.dataset.token_use import TokenCounter, TokenUse

BUCKETS_TOLD = 6
NAMES_TOLD = 3
NAME_CHARACTERS = 40  # longer file names lose their middle
LOST_TOLD = 120  # characters
COPY_TOLD = 200  # characters: a longer caption that is trained as it was read is not printed again


def fact_lines(facts: Facts, showings: Showings) -> Iterator[str]:
    """A few lines for each dataset, then what is true of all of them; one fact a line, with its numbers."""
    for dataset in facts.datasets:
        yield from dataset_lines(dataset)
    epochs = f"{counted(showings.steps_per_epoch, 'step')} an epoch, {counted(showings.epochs, 'epoch')}"
    yield f"{epochs}, {counted(showings.total_steps, 'step')} in all"
    for encoder in facts.encoders:
        cut = f", {counted(encoder.over, 'caption')} longer than that and cut" if encoder.over else ""
        yield f"{encoder.encoder}: at most {encoder.longest:,} tokens of {encoder.limit:,}{cut}"
    if facts.cut:
        yield f"  cut: {_names([cut.item for cut in facts.cut])}"
    yield from _check_lines(facts)
    if facts.without_caption:
        yield f"without a caption: {counted(len(facts.without_caption), 'image')}: {_names(facts.without_caption)}"
    if facts.with_class_tokens:
        words = counted(len(facts.with_class_tokens), "image")
        yield f"no caption of their own, the class tokens stand in: {words}: {_names(facts.with_class_tokens)}"
    if facts.skipped:
        yield f"left out (--skip_bad_images): {counted(len(facts.skipped), 'bad image or caption', 'bad images or captions')}"


def caption_lines(training_set: TrainingSet, showings: Showings, count_tokens: TokenCounter, *, images: int) -> Iterator[str]:
    """Of the first ``images`` images of each subset: the caption as read, and as the encoder gets it at single showings."""
    for (dataset, subset, validates), items in _by_subset(training_set, showings).items():
        settings = items[0].subset
        source = settings.metadata_file or settings.image_dir
        kind = ", validation" if validates else ", regularisation" if settings.is_reg else ""
        told = items[:images]
        name = f"dataset {dataset + 1}, subset {subset + 1}{kind} ({visible_name(str(source))})"
        yield f"{name}: {len(told):,} of {len(items):,} captions"
        for item in told:
            yield ""
            yield from _item_lines(item, showings.examples(item), count_tokens)
        yield ""


def visible(text: str) -> str:
    """Control characters, which could change the terminal, as ``\\x1b``; line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def visible_name(path: str) -> str:
    """A path on one line, whatever its bytes are."""
    return visible(printable(path))


def _escape(char: str) -> str:
    # joiners inside emoji and scripts, marks of direction and lone surrogates count as unprintable to Python, yet are harmless
    return char if ord(char) >= 0xA0 else f"\\x{ord(char):02x}"


def dataset_lines(dataset: DatasetFacts) -> Iterator[str]:
    """Sizes and counts of one dataset, also for the plan of a run."""
    settings = dataset.settings
    width, height = settings.resolution_wh
    yield f"dataset {dataset.index + 1} ({visible(settings.place)}): {width}x{height} px, {settings.batch_size} per batch"
    training, regular = dataset.training, dataset.regularisation
    counts = [f"{counted(len(training), 'image')}, {sum(i.repeats for i in training):,} with repeats"]
    if regular:
        counts.append(f"{len(regular):,} for regularisation, {sum(i.repeats for i in regular):,} with repeats")
    counts += [f"{len(dataset.validation):,} for validation"] if dataset.validation else []
    counts += [f"{dataset.masked:,} masked"] if dataset.masked else []
    yield f"  {'; '.join(counts)}"
    batches = f"{counted(dataset.batches, 'batch', 'batches')} an epoch"
    yield f"  {batches}" + (f", {dataset.incomplete:,} of them not full" if dataset.incomplete else "")
    told = sorted(dataset.buckets, key=lambda bucket: -bucket.showings)[:BUCKETS_TOLD]
    sizes = ", ".join(f"{bucket.bucket_wh[0]}x{bucket.bucket_wh[1]} ({bucket.showings:,})" for bucket in told)
    rest = f" and {len(dataset.buckets) - BUCKETS_TOLD:,} more" if len(dataset.buckets) > BUCKETS_TOLD else ""
    yield f"  {counted(len(dataset.buckets), 'bucket')}: {sizes}{rest}"


def _check_lines(facts: Facts) -> Iterator[str]:
    if facts.with_empty_mask:
        empty = facts.with_empty_mask
        yield f"empty masks, so that nothing counts: {counted(len(empty), 'image')}: {_names(empty)}"
    if facts.enlarged:
        most = f"{counted(len(facts.enlarged), 'image')}, at most {facts.enlarged[0].scale:.2f}x"
        yield f"enlarged: {most}: {_names(facts.enlarged)}"
    if facts.cropped:
        yield (
            f"much cropped: {counted(len(facts.cropped), 'image')}, at most {cut_away(facts.cropped[0]):.0%} of the area: "
            f"{_names(facts.cropped)}"
        )
    yield from _duplicate_lines(facts)


def _duplicate_lines(facts: Facts) -> Iterator[str]:
    if not facts.duplicates:
        return
    names = _names(facts.duplicates[0].items)
    files = counted(facts.duplicate_files, "file")
    yield f"duplicates: {files} in {counted(len(facts.duplicates), 'group')} with the same bytes, such as {names}"


def _by_subset(training_set: TrainingSet, showings: Showings) -> dict[tuple[int, int, bool], list[Item]]:
    groups: dict[tuple[int, int, bool], list[Item]] = defaultdict(list)
    for item in training_set.all_items:
        groups[item.dataset_index, item.subset_index, showings.is_validation(item)].append(item)
    return dict(sorted(groups.items()))


def _item_lines(item: Item, examples: Sequence[CaptionExample], count_tokens: TokenCounter) -> Iterator[str]:
    yield visible_name(str(item.path))
    width = max(len("as read"), *(len(_when(example)) for example in examples)) + 2
    yield _labelled("as read", item.caption or "''", width)
    for example in examples:
        uses = count_tokens(example.text)
        empty = "'' (dropped)" if example.dropped else "''"
        is_long_copy = example.text == item.caption and len(item.caption) > COPY_TOLD
        yield _labelled(_when(example), "the same" if is_long_copy else example.text or empty, width)
        tokens = ", ".join(f"{use.encoder} {use.tokens:,} of {use.limit:,}" for use in uses)
        yield f"  {'':{width}}[tokens: {tokens}]"
        for use in uses:
            if use.cut_at is not None:
                yield f"  {'':{width}}{_lost(example.text, use)}"


def _when(example: CaptionExample) -> str:
    return f"epoch {example.epoch}, showing {example.occurrence + 1}"


def _labelled(label: str, text: str, width: int) -> str:
    """Further lines of the text stand under its first."""
    indent = "\n" + " " * (width + 2)
    return f"  {label + ':':{width}}{visible(text).replace(chr(10), indent)}"


def _lost(text: str, use: TokenUse) -> str:
    lost = text[use.cut_at :]
    shown = lost[:LOST_TOLD] + (" ..." if len(lost) > LOST_TOLD else "")
    return f"{use.encoder} does not see the last {len(lost):,} of {len(text):,} characters: {visible(shown)}"


def _names(items: Sequence[Item]) -> str:
    unique = list(dict.fromkeys(item.path for item in items))
    names = ", ".join(_short(visible_name(path.name)) for path in unique[:NAMES_TOLD])
    return names + (" ..." if len(unique) > NAMES_TOLD else "")


def _short(name: str) -> str:
    """A long name without its middle."""
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS // 2]}...{name[-NAME_CHARACTERS // 2 :]}"
