"""The page of --debug_dataset: one HTML file with everything in it, which opens from disk and asks for nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.dataset.items import Item
from library.dataset.page.cards import KINDS, CardMaker, kinds_of_items, times
from library.dataset.page.facts import BucketFacts, Facts, counted
from library.dataset.page.html import Content, Html, element, joined
from library.dataset.page.pictures import SmallPictures, shown_words
from library.dataset.page.sections import (
    ImageNames,
    bucket_id,
    buckets_section,
    captions_section,
    checks_section,
    datasets_section,
    section,
    tags_section,
    warnings_section,
)
from library.dataset.page.showings import Showings
from library.dataset.token_use import TokenCounter
from library.files.atomic import write_atomically

HERE = Path(__file__).parent
NOTHING_FROM_OUTSIDE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageContent:
    """What the page shows. ``pictures``: of the images that get a card, in the order of the page; ``notes`` end the head."""

    title: str
    architecture: str
    facts: Facts
    showings: Showings
    count_tokens: TokenCounter
    pictures: Mapping[int, SmallPictures]  # by Item.index
    warnings: Sequence[str]
    notes: Sequence[str] = ()


def write_page(path: Path, content: PageContent) -> int:
    """Writes the file at once or not at all; returns its size in bytes. Raises OutputError."""
    data = page_html(content).encode("utf-8", errors="backslashreplace")  # names of files need not be valid text
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def page_html(content: PageContent) -> Html:
    names = ImageNames(content.pictures.keys(), len(content.facts.datasets))
    warnings = warnings_section(content.warnings, content.facts.skipped)
    main = element(
        "main",
        warnings,
        datasets_section(content.facts),
        buckets_section(content.facts),
        checks_section(content.facts, names),
        captions_section(content.facts, names),
        tags_section(content.facts),
        _pictures_section(content),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=NOTHING_FROM_OUTSIDE),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", content.title),
        element("style", Html((HERE / "page.css").read_text(encoding="utf-8"))),
    )
    script = element("script", Html((HERE / "page.js").read_text(encoding="utf-8")))
    body = element("body", _header(content), _navigation(has_warnings=warnings is not None), main, script)
    return joined([Html("<!DOCTYPE html>\n"), element("html", head, body, lang="en")])


def _header(content: PageContent) -> Html:
    showings = content.showings
    lead = f"{content.architecture} \u00b7 seed {showings.seed} \u00b7 {showings.epochs:,} epochs, {showings.total_steps:,} steps"
    tiles = [_tile(name, value) for name, value in _counts(content.facts, showings)]
    alerts = [_tile(name, value, anchor=anchor) for name, value, anchor in _alerts(content.facts) if value]
    notes = [element("p", note, class_="note") for note in content.notes]
    rows = [element("dl", row, class_="tiles") for row in (tiles, alerts) if row]
    return element("header", element("h1", content.title), element("p", lead, class_="lead"), rows, notes)


def _counts(facts: Facts, showings: Showings) -> Iterator[tuple[str, int]]:
    training = [item for dataset in facts.datasets for item in dataset.training]
    regular = [item for dataset in facts.datasets for item in dataset.regularisation]
    yield "images to train", len(training)
    yield "with repeats", sum(item.repeats for item in training)
    if regular:
        yield "regularisation", len(regular)
        yield "with repeats", sum(item.repeats for item in regular)
    for name, count in (
        ("validation", sum(len(dataset.validation) for dataset in facts.datasets)),
        ("masked", sum(dataset.masked for dataset in facts.datasets)),
    ):
        if count:
            yield name, count
    yield "batches an epoch", sum(dataset.batches for dataset in facts.datasets)
    yield "steps an epoch", showings.steps_per_epoch


def _alerts(facts: Facts) -> Iterator[tuple[str, int, str]]:
    yield "empty masks", len(facts.with_empty_mask), "checks"
    yield "enlarged", len(facts.enlarged), "checks"
    yield "much cropped", len(facts.cropped), "checks"
    yield "duplicates", facts.duplicate_files, "checks"
    yield "captions cut", len(facts.cut), "captions"
    yield "without caption", len(facts.without_caption), "captions"
    yield "left out", len(facts.skipped), "warnings"


def _tile(name: str, value: int, *, anchor: str | None = None) -> Html:
    number: Content = f"{value:,}" if anchor is None else element("a", f"{value:,}", href=f"#{anchor}")
    return element("div", element("dt", name), element("dd", number), class_=None if anchor is None else "alert")


def _navigation(*, has_warnings: bool) -> Html:
    places = [("datasets", "Datasets"), ("buckets", "Buckets"), ("checks", "Images to look at"), ("captions", "Captions")]
    places += [("tags", "Tags"), ("pictures", "Pictures")]
    if has_warnings:
        places.insert(0, ("warnings", "Warnings"))
    links = [element("li", element("a", words, href=f"#{anchor}")) for anchor, words in places]
    return element("nav", element("ul", links), aria_label="sections of this page")


def _pictures_section(content: PageContent) -> Html:
    facts = content.facts
    maker = CardMaker(showings=content.showings, count_tokens=content.count_tokens, kinds=kinds_of_items(facts, content.showings))
    kinds = [kind for kind in KINDS if any(kind in maker.kinds.get(index, ()) for index in content.pictures)]
    parts: list[Content] = [_tools(kinds)]
    for dataset in facts.datasets:
        if len(facts.datasets) > 1:
            parts.append(element("h3", f"Dataset {dataset.index + 1}", element("small", dataset.settings.place)))
        parts += [_bucket(bucket, content.pictures, maker) for bucket in dataset.buckets]
    return section("pictures", "Pictures", parts, note=shown_words(len(content.pictures), facts.images))


def _bucket(bucket: BucketFacts, pictures: Mapping[int, SmallPictures], maker: CardMaker) -> Html:
    items: list[Item] = [*bucket.items, *bucket.validation]
    cards = [maker.card(item, pictures[item.index]) for item in items if item.index in pictures]
    batches = counted(bucket.batches, "batch", "batches")
    note = f"{len(cards):,} of {counted(len(items), 'image')} shown \u00b7 {bucket.showings:,} with repeats \u00b7 {batches}"
    return element(
        "details",
        element("summary", times(bucket.bucket_wh), element("small", note)),
        element("div", cards, class_="cards"),
        class_="bucket",
        id=bucket_id(bucket.dataset_index, bucket.bucket_wh),
        open=True,
    )


def _tools(kinds: Collection[str]) -> Html:
    """Overlays are switched by the style sheet alone; the filters need the script."""
    options = [element("option", "all images", value=""), *(element("option", KINDS[kind], value=kind) for kind in kinds)]
    return element(
        "div",
        _switch("show-crops", "crops"),
        _switch("show-masks", "masks") if "masked" in kinds else None,
        element("input", type="search", id="card-words", placeholder="name or caption", aria_label="filter by name or caption",
                class_="needs-script", hidden=True),
        element("select", options, id="card-kind", aria_label="kind of image", class_="needs-script", hidden=True),
        element("span", id="card-count", class_="note", aria_live="polite"),
        class_="tools",
    )  # fmt: skip


def _switch(name: str, words: str) -> Html:
    return element("label", element("input", type="checkbox", id=name, checked=True), words)
