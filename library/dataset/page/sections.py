"""The tables and histograms of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from library.dataset.items import DatasetSettings, Item, SubsetSettings
from library.dataset.page.cards import card_id, percent, times
from library.dataset.page.facts import LARGE_CROP, DatasetFacts, EncoderFacts, Facts, counted, cut_away
from library.dataset.page.html import Content, Html, element, joined
from library.dataset.token_use import TokenUse

ROWS = 100  # of a list of images
TAGS = 200  # of one dataset
LOST_SHOWN = 120  # characters of what is cut off a caption
COLUMNS = 32  # of a histogram of lengths
WARNINGS_OPEN = 8  # more are folded

NOT_SETTINGS = (
    "place",
    "image_dir",
    "metadata_file",
    "conditioning_data_dir",
    "num_repeats",
    "is_reg",
    "is_validation",
    "tags_joined",
)


@dataclass(frozen=True, slots=True)
class ImageNames:
    """How lists name images: those ``shown`` (by Item.index) link to their cards, and several datasets are told apart."""

    shown: Collection[int]
    datasets: int

    @property
    def heads(self) -> tuple[str, ...]:
        return ("image", "dataset") if self.datasets > 1 else ("image",)

    def cells(self, item: Item) -> tuple[Content, ...]:
        return (self.link(item), item.dataset_index + 1) if self.datasets > 1 else (self.link(item),)

    def link(self, item: Item, *, with_folder: bool = False) -> Html:
        text = element("bdi", f"{item.path.parent.name}/{item.path.name}" if with_folder else item.path.name)
        if item.index in self.shown:
            return element("a", text, href=f"#{card_id(item)}", title=item.path, class_="file")
        return element("span", text, title=item.path, class_="file")


def section(anchor: str, title: str, *content: Content, note: str | None = None) -> Html:
    heading = element("h2", title, element("small", note) if note else None)
    return element("section", heading, *content, id=anchor)


def table(heads: Sequence[str], rows: Iterable[Sequence[Content]], *, numbers: Collection[str] = (), tall: bool = False) -> Html:
    """``numbers``: the heads of columns that are set flush right. A wide table scrolls in its place, a ``tall`` one down too."""
    right = [head in numbers for head in heads]
    top = element("tr", [element("th", head, scope="col", class_="number" if is_number else None)
                         for head, is_number in zip(heads, right, strict=True)])  # fmt: skip
    body = [
        element(
            "tr",
            [element("td", cell, class_="number" if is_number else None) for cell, is_number in zip(row, right, strict=True)],
        )
        for row in rows
    ]
    return element(
        "div",
        element("table", element("thead", top), element("tbody", body)),
        class_="scroll tall" if tall else "scroll",
        tabindex="0",
    )


def bar(share: float, *, words: str = "") -> Html:
    return element("span", element("span", style=f"width:{share * 100:.1f}%"), class_="bar", role="img", aria_label=words)


def warnings_section(warnings: Sequence[str], skipped: Sequence[str]) -> Html | None:
    if not warnings and not skipped:
        return None
    lines = [element("li", warning) for warning in warnings]
    shown: list[Content] = [element("ul", lines[:WARNINGS_OPEN], class_="warnings")]
    if len(lines) > WARNINGS_OPEN:
        shown.append(
            _folded(f"{len(lines) - WARNINGS_OPEN} more warnings", element("ul", lines[WARNINGS_OPEN:], class_="warnings"))
        )
    if skipped:
        words = f"{len(skipped):,} bad images or captions left out (--skip_bad_images)"
        shown.append(_folded(words, element("ul", [element("li", line) for line in skipped], class_="warnings"), is_open=True))
    return section("warnings", "Warnings", shown, note=f"{len(warnings) + len(skipped):,}")


def datasets_section(facts: Facts) -> Html:
    return section("datasets", "Datasets", [_dataset(dataset) for dataset in facts.datasets])


def buckets_section(facts: Facts) -> Html:
    parts = []
    for dataset in facts.datasets:
        words = f"{counted(len(dataset.buckets), 'bucket')}, {counted(dataset.batches, 'batch', 'batches')} an epoch"
        if dataset.incomplete:
            share = percent(dataset.incomplete / dataset.batches)
            words += f"; {dataset.incomplete:,} of them ({share}) not full"
        parts += [_heading(facts, dataset, words), _bucket_table(dataset)]
    return section("buckets", "Buckets", parts)


def captions_section(facts: Facts, names: ImageNames) -> Html:
    parts: list[Content] = [element("div", [_lengths(encoder) for encoder in facts.encoders], class_="columns-2")]
    if facts.wildcards:
        parts.append(element("p", "Of captions with wildcards or several lines, one version is counted.", class_="note"))
    if facts.cut:
        rows = [[*names.cells(cut.item), _over(cut.uses), _start(cut.lost)] for cut in facts.cut[:ROWS]]
        parts.append(_listed("Cut captions", len(facts.cut), table((*names.heads, "tokens", "what is lost"), rows, tall=True)))
    if facts.without_caption:
        parts.append(_listed("Images without a caption", len(facts.without_caption), _names(facts.without_caption, names)))
    if facts.with_class_tokens:
        words = "Images with no caption of their own: the class tokens stand in"
        parts.append(_listed(words, len(facts.with_class_tokens), _names(facts.with_class_tokens, names)))
    return section("captions", "Captions", parts)


def checks_section(facts: Facts, names: ImageNames) -> Html:
    """Images that train nothing, duplicates, enlarged and much cropped ones."""
    masks = None
    if facts.with_empty_mask:
        words = "Empty masks: nothing of these images counts"
        masks = _listed(words, len(facts.with_empty_mask), _names(facts.with_empty_mask, names))
    sizes = [element("div", part) for part in (_enlarged(facts.enlarged, names), _cropped(facts.cropped, names))]
    return section("checks", "Images to look at", masks, _duplicates(facts, names), element("div", sizes, class_="columns-2"))


def tags_section(facts: Facts) -> Html:
    return section("tags", "Tags", [_tag_table(facts, dataset) for dataset in facts.datasets])


def _heading(facts: Facts, dataset: DatasetFacts, words: str) -> Html:
    name = element("h3", f"Dataset {dataset.index + 1}") if len(facts.datasets) > 1 else None
    return joined([name, element("p", words, class_="note")])


def _dataset(dataset: DatasetFacts) -> Html:
    rows = [_subset_row(dataset, number, subset) for number, subset in enumerate(dataset.settings.subsets)]
    heads = ("subset", "images", "with repeats", "validation", "source", "settings")
    return joined(
        [
            element("h3", f"Dataset {dataset.index + 1}", element("small", dataset.settings.place)),
            element("p", [element("span", fact, class_="chip") for fact in _dataset_facts(dataset)], class_="chips"),
            table(heads, rows, numbers=("images", "with repeats", "validation")),
        ]
    )


def _dataset_facts(dataset: DatasetFacts) -> Iterator[str]:
    settings = dataset.settings
    yield f"resolution {times(settings.resolution_wh)}"
    yield f"{settings.batch_size} per batch"
    yield f"{counted(dataset.batches, 'batch', 'batches')} an epoch"
    yield _bucket_words(settings)
    if settings.network_multiplier != 1:
        yield f"network strength {settings.network_multiplier:g}"
    if settings.validation_split > 0:
        yield f"{percent(settings.validation_split)} for validation"
    if dataset.masked:
        yield f"{dataset.masked:,} masked"


def _bucket_words(settings: DatasetSettings) -> str:
    if not settings.enable_bucket:
        return "no buckets: all cropped to one size"
    if settings.bucket_no_upscale:
        return f"buckets in steps of {settings.bucket_reso_steps} px, nothing enlarged"
    return f"buckets {settings.min_bucket_reso} to {settings.max_bucket_reso} px in steps of {settings.bucket_reso_steps}"


def _subset_row(dataset: DatasetFacts, number: int, subset: SubsetSettings) -> list[Content]:
    mine = [item for item in dataset.items if item.subset_index == number]
    validating = sum(item.subset_index == number for item in dataset.validation)
    chips = [element("span", words, class_="chip") for words in _subset_facts(subset)]
    source = subset.metadata_file or subset.image_dir
    return [number + 1, f"{len(mine):,}", f"{sum(i.repeats for i in mine):,}", f"{validating:,}", element("bdi", source), chips]


def _subset_facts(subset: SubsetSettings) -> Iterator[str]:
    yield counted(subset.num_repeats, "repeat")
    if subset.is_reg:
        yield "regularisation"
    if subset.is_validation:
        yield "validation"
    if subset.conditioning_data_dir:
        yield f"masks from {subset.conditioning_data_dir}"
    for field in fields(subset):
        value = getattr(subset, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in NOT_SETTINGS and value != default:
            yield field.name if value is True else f"{field.name} {value!r}"


def _bucket_table(dataset: DatasetFacts) -> Html:
    most = max((bucket.showings for bucket in dataset.buckets), default=0) or 1
    rows = []
    for bucket in dataset.buckets:
        last = f"{bucket.last_batch} of {bucket.batch_size}" if bucket.is_incomplete else "full"
        amount = f"{bucket.showings:,}"
        rows.append(
            [
                element("a", times(bucket.bucket_wh), href=f"#{bucket_id(dataset.index, bucket.bucket_wh)}"),
                f"{len(bucket.items):,}",
                amount,
                bar(bucket.showings / most, words=f"{amount} with repeats"),
                f"{bucket.batches:,}",
                element("span", last if bucket.batches else "", class_="over" if bucket.is_incomplete else None),
                *([f"{len(bucket.validation):,}"] if dataset.validation else []),
            ]
        )
    heads = ["bucket", "images", "with repeats", "", "batches", "last batch", *(["validation"] if dataset.validation else [])]
    return table(heads, rows, numbers=("images", "with repeats", "batches", "validation"))


def bucket_id(dataset_index: int, bucket_wh: tuple[int, int]) -> str:
    return f"bucket-{dataset_index + 1}-{bucket_wh[0]}x{bucket_wh[1]}"


def _lengths(encoder: EncoderFacts) -> Html:
    """A histogram of caption lengths with the limit marked."""
    width, counts = _columns(encoder)
    highest = max(counts.values(), default=1)
    last = width * (max(counts, default=0) + 1)
    columns = []
    for number in range(last // width):
        count, start = counts.get(number, 0), number * width
        words = f"{start + 1 if number else 0} to {start + width} tokens: {count:,} images"
        over = "over" if start >= encoder.limit else None
        height = f"height:{count / highest * 100:.1f}%" if count else None
        columns.append(element("span", style=height, class_=over, title=words))
    marked = last > encoder.limit
    limit = element(
        "span", element("b", f"limit {encoder.limit}"), class_="limit", style=f"left:{encoder.limit / last * 100:.2f}%"
    )
    over = f"{encoder.over:,} over the limit of {encoder.limit}" if encoder.over else f"none over the limit of {encoder.limit}"
    title = f"{encoder.encoder}: longest {encoder.longest:,} tokens, {over}"
    plot = element("div", columns, limit if marked else None, class_="plot", role="img", aria_label=title)
    axis = element("p", element("span", "0"), element("span", f"{last:,} tokens"), class_="axis")
    return element("figure", element("figcaption", title), plot, axis, class_="lengths")


def _columns(encoder: EncoderFacts) -> tuple[int, Counter[int]]:
    """(tokens in one column, images in each). Column n holds the lengths above n * width up to (n + 1) * width, so that a text
    of exactly the limit's length, which is not cut, stands left of the line; the first holds the empty text as well."""
    width = 1
    while encoder.longest > width * COLUMNS:
        width *= 2
    counts: Counter[int] = Counter()
    for length, count in encoder.lengths.items():
        counts[max(length - 1, 0) // width] += count
    return width, counts


def _over(uses: Sequence[TokenUse]) -> list[Html]:
    return [element("div", f"{use.encoder} {use.tokens:,} of {use.limit:,}", class_="nowrap") for use in uses]


def _start(lost: str) -> Html:
    text = lost[:LOST_SHOWN] + ("\u2026" if len(lost) > LOST_SHOWN else "")
    return element("span", "\u2026", text, dir="auto", class_="lost")


def _duplicates(facts: Facts, names: ImageNames) -> Html:
    groups = facts.duplicates
    if not groups:
        return _none("Duplicates", "no two image files have the same bytes")
    rows = []
    for group in groups[:ROWS]:
        copies = [element("li", names.link(item, with_folder=True)) for item in group.items]
        note = "captions differ" if group.captions_differ else ""
        rows.append([element("ul", copies, class_="plain"), element("span", note, class_="over")])
    note = f"{counted(facts.duplicate_files, 'file')} in {counted(len(groups), 'group')}"
    note += f", {ROWS} groups shown" if len(groups) > ROWS else ""
    return _listed("Duplicates: files with the same bytes", note, table(("files", ""), rows, tall=True))


def _enlarged(items: Sequence[Item], names: ImageNames) -> Html:
    if not items:
        return _none("Enlarged", "no image is smaller than its bucket")
    rows = [[*names.cells(i), times(i.size_wh), times(i.resized_wh), f"{i.scale:.2f}\u00d7"] for i in items[:ROWS]]
    heads = (*names.heads, "file", "resized", "factor")
    return _listed("Enlarged to fill their bucket", len(items), table(heads, rows, numbers=("factor",), tall=True))


def _cropped(items: Sequence[Item], names: ImageNames) -> Html:
    if not items:
        return _none("Much cropped", f"no image loses more than {percent(LARGE_CROP)} of its area")
    rows = [[*names.cells(i), times(i.resized_wh), times(i.bucket_wh), percent(cut_away(i))] for i in items[:ROWS]]
    heads = (*names.heads, "resized", "bucket", "cut away")
    title = f"Cropped by more than {percent(LARGE_CROP)} of their area"
    return _listed(title, len(items), table(heads, rows, numbers=("cut away",), tall=True))


def _tag_table(facts: Facts, dataset: DatasetFacts) -> Html:
    images = len(dataset.items) or 1
    tags = facts.tags[dataset.index]
    common = sorted(tags.items(), key=lambda entry: (-entry[1], entry[0]))[:TAGS]
    words = counted(len(tags), "different tag")
    if len(tags) > TAGS:
        words += f"; the {TAGS} most frequent are shown"
    rows = [
        [element("span", tag, dir="auto", class_="tag"), f"{count:,}", percent(count / images), bar(count / images)]
        for tag, count in common
    ]
    box = element("input", type="search", placeholder="filter tags", aria_label="filter tags", data_filters="rows", hidden=True)
    frequency = table(("tag", "images", "share", ""), rows, numbers=("images", "share"), tall=True)
    return element("div", _heading(facts, dataset, words), box, frequency, class_="tags")


def _names(items: Sequence[Item], names: ImageNames) -> Html:
    return element("ul", [element("li", names.link(item)) for item in items[:ROWS]], class_="names")


def _listed(title: str, count: int | str, content: Html) -> Html:
    """``count``: of the rows there are, or a note of its own."""
    note = count if isinstance(count, str) else f"{count:,}" if count <= ROWS else f"{ROWS} of {count:,} shown"
    return element("details", element("summary", title, element("small", note)), content, open=True)


def _none(title: str, words: str) -> Html:
    return element("p", element("b", title), f": {words}.", class_="note")


def _folded(title: str, content: Html, *, is_open: bool = False) -> Html:
    return element("details", element("summary", title), content, open=is_open)
