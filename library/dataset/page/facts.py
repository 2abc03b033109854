"""What there is to know about a training set before it is trained: buckets, tags, text lengths, and what may be wrong with it.

Counted over every image; what is shown of it is the business of the page and of the terminal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from library.dataset.captions import split_tags
from library.dataset.empty_masks import has_empty_mask
from library.dataset.image_records import ImageRecords
from library.dataset.items import DatasetSettings, Item, TrainingSet
from library.dataset.order import items_by_bucket
from library.dataset.page.showings import Showings
from library.dataset.token_use import TokenCounter, TokenUse

LARGE_CROP = 0.1  # share of the picture that is cut away, above which it is listed

Size = tuple[int, int]
Progress = Callable[[int, int], None]  # (done, in all)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketFacts:
    """One bucket of one dataset. ``batch_size``: images of all processes in one batch."""

    dataset_index: int
    bucket_wh: Size
    items: tuple[Item, ...]  # trained
    validation: tuple[Item, ...]
    batch_size: int

    @property
    def showings(self) -> int:
        """Images with repeats: showings in an epoch."""
        return sum(item.repeats for item in self.items)

    @property
    def batches(self) -> int:
        return -(-self.showings // self.batch_size)

    @property
    def last_batch(self) -> int:
        """Images in the last batch of an epoch, 0 where nothing is trained."""
        return self.showings - (self.batches - 1) * self.batch_size if self.batches else 0

    @property
    def is_incomplete(self) -> bool:
        return 0 < self.last_batch < self.batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """One dataset of the file. Counts are of images, those with repeats of showings in an epoch."""

    index: int
    settings: DatasetSettings
    buckets: tuple[BucketFacts, ...]
    items: tuple[Item, ...]  # trained
    validation: tuple[Item, ...]

    @property
    def training(self) -> list[Item]:
        return [item for item in self.items if not item.subset.is_reg]

    @property
    def regularisation(self) -> list[Item]:
        return [item for item in self.items if item.subset.is_reg]

    @property
    def masked(self) -> int:
        return sum(item.is_masked for item in (*self.items, *self.validation))

    @property
    def batches(self) -> int:
        return sum(bucket.batches for bucket in self.buckets)

    @property
    def incomplete(self) -> int:
        return sum(bucket.is_incomplete for bucket in self.buckets)


@dataclass(frozen=True, slots=True)
class CutCaption:
    """A caption that some encoder does not see to its end. ``uses``: of those encoders."""

    item: Item
    text: str
    uses: tuple[TokenUse, ...]

    @property
    def lost(self) -> str:
        """What at least one encoder does not see."""
        return self.text[min(use.cut_at for use in self.uses if use.cut_at is not None) :]


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """Lengths of all captions for one encoder, in tokens: length -> images."""

    encoder: str
    limit: int
    lengths: Counter[int]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def over(self) -> int:
        return sum(count for length, count in self.lengths.items() if length > self.limit)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Image files with the same bytes: all of them are trained, or all of them validate."""

    items: tuple[Item, ...]  # one for each file
    captions_differ: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything about a training set. Lists of items are sorted, the worst first."""

    datasets: tuple[DatasetFacts, ...]
    tags: tuple[Counter[str], ...]  # of each dataset: of the trained images' captions as they are read
    encoders: tuple[EncoderFacts, ...]
    cut: tuple[CutCaption, ...]
    duplicates: tuple[Duplicates, ...]
    enlarged: tuple[Item, ...]
    cropped: tuple[Item, ...]  # those that lose more than LARGE_CROP
    with_empty_mask: tuple[Item, ...]  # nothing of them counts in the loss
    without_caption: tuple[Item, ...]  # the encoder gets the empty text
    with_class_tokens: tuple[Item, ...]  # no caption of their own
    skipped: tuple[str, ...]
    wildcards: bool  # some captions have several versions, of which one was counted

    @property
    def duplicate_files(self) -> int:
        """Image files that are not the only ones with their bytes."""
        return sum(len(group.items) for group in self.duplicates)

    @property
    def images(self) -> int:
        return sum(len(dataset.items) + len(dataset.validation) for dataset in self.datasets)


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """``"1 image"``, ``"1,200 images"``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def cut_away(item: Item) -> float:
    """Share of the picture's area that the crop leaves out, 0 to 1."""
    kept = item.bucket_wh[0] * item.bucket_wh[1] / (item.resized_wh[0] * item.resized_wh[1])
    return max(1.0 - kept, 0.0)


def gather_facts(
    training_set: TrainingSet,
    showings: Showings,
    *,
    processes: int,
    count_tokens: TokenCounter,
    duplicates: Sequence[Duplicates] = (),
    progress: Progress | None = None,
) -> Facts:
    """``progress`` follows the counting of tokens, which takes the longest."""
    everything, records = training_set.all_items, training_set.records
    datasets = tuple(dataset_facts(training_set, processes=processes))
    encoders, cut = _text_lengths(everything, showings, count_tokens, progress)
    captions = {item.index: showings.full_text(item) for item in everything if not item.caption.strip()}
    return Facts(
        datasets=datasets,
        tags=tuple(Counter(tag for item in one.items for tag in dict.fromkeys(tags_of(item))) for one in datasets),
        encoders=encoders,
        cut=cut,
        duplicates=tuple(duplicates),
        enlarged=_worst((item for item in everything if item.scale > 1), attrgetter("scale")),
        cropped=_worst((item for item in everything if cut_away(item) > LARGE_CROP), cut_away),
        with_empty_mask=tuple(item for item in everything if records is not None and has_empty_mask(item, records)),
        without_caption=tuple(item for item in everything if not captions.get(item.index, "x").strip()),
        with_class_tokens=tuple(item for item in everything if _has_class_tokens_only(item)),
        skipped=training_set.skipped,
        wildcards=any(item.subset.enable_wildcard for item in everything),
    )


def find_duplicates(training_set: TrainingSet) -> tuple[Duplicates, ...]:
    """Groups of image files with the same bytes, links included; the same file in two datasets is none.

    The scan's records know the hashes. Raises DatasetError where a file without a record cannot be read.
    """
    records = training_set.records or ImageRecords(reads=False, writes=False)
    by_path: dict[Path, list[Item]] = defaultdict(list)
    for item in training_set.all_items:
        by_path[item.path].append(item)
    same: dict[bytes, list[Path]] = defaultdict(list)
    for path in by_path:
        record = records.get(path)
        same[record.sha256 if record else bytes.fromhex(records.identity(path).sha256)].append(path)
    groups = ([by_path[path] for path in group] for group in same.values() if len(group) > 1)
    found = [_duplicates(group) for group in groups]
    return tuple(sorted(found, key=lambda group: (-len(group.items), group.items[0].index)))


def tags_of(item: Item) -> list[str]:
    """The tags of all lines of the caption as it is read, cut where training would cut them; markers are none."""
    lines = [split_tags(line, item.subset) for line in item.caption.split("\n")]
    return [tag for parts in lines for tag in (*parts.head, *parts.flexible, *parts.tail) if tag]


def dataset_facts(training_set: TrainingSet, *, processes: int) -> Iterator[DatasetFacts]:
    """Of each dataset of the file."""
    trained, validating = items_by_bucket(training_set.items), items_by_bucket(training_set.validation)
    for index, settings in enumerate(training_set.datasets):
        sizes = sorted({bucket for owner, bucket in (*trained, *validating) if owner == index})
        buckets = tuple(
            BucketFacts(
                dataset_index=index,
                bucket_wh=size,
                items=tuple(trained.get((index, size), ())),
                validation=tuple(validating.get((index, size), ())),
                batch_size=settings.batch_size * processes,
            )
            for size in sizes
        )
        items = tuple(item for item in training_set.items if item.dataset_index == index)
        yield DatasetFacts(
            index=index,
            settings=settings,
            buckets=buckets,
            items=items,
            validation=tuple(item for item in training_set.validation if item.dataset_index == index),
        )


def _text_lengths(
    items: Sequence[Item], showings: Showings, count_tokens: TokenCounter, progress: Progress | None
) -> tuple[tuple[EncoderFacts, ...], tuple[CutCaption, ...]]:
    known: dict[str, Sequence[TokenUse]] = {}
    facts: dict[str, EncoderFacts] = {}
    cut: list[CutCaption] = []
    for done, item in enumerate(items, start=1):
        text = showings.full_text(item)
        uses = known.get(text)
        if uses is None:
            uses = known[text] = count_tokens(text)
        for use in uses:
            facts.setdefault(use.encoder, EncoderFacts(use.encoder, use.limit, Counter())).lengths[use.tokens] += 1
        if cutting := tuple(use for use in uses if use.cut_at is not None):
            cut.append(CutCaption(item, text, cutting))
        if progress is not None:
            progress(done, len(items))
    cut.sort(key=lambda one: (-len(one.lost), one.item.index))
    return tuple(facts.values()), tuple(cut)


def _worst(items: Iterable[Item], measure: Callable[[Item], float]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: (-measure(item), item.index)))


def _has_class_tokens_only(item: Item) -> bool:
    words = item.subset.class_tokens
    return bool(words) and item.subset.metadata_file is None and item.caption == words


def _duplicates(files: list[list[Item]]) -> Duplicates:
    captions = {item.caption for items in files for item in items}
    return Duplicates(items=tuple(items[0] for items in files), captions_differ=len(captions) > 1)
