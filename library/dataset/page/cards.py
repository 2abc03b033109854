"""One card for each image of the page: the original with its crop, what is trained of it, and its captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.dataset.items import Item
from library.dataset.page.facts import Facts, cut_away
from library.dataset.page.html import Html, element, joined
from library.dataset.page.pictures import SmallPictures
from library.dataset.page.showings import CaptionExample, Showings
from library.dataset.token_use import TokenCounter, TokenUse

LONG_CAPTION = 400  # characters; longer ones scroll inside their card

KINDS = {  # what the page can be narrowed to: class of the badge -> its text
    "validation": "validation",
    "reg": "regularisation",
    "masked": "masked",
    "blank": "nothing counts",
    "enlarged": "enlarged",
    "cropped": "much cropped",
    "duplicate": "duplicate",
    "cut": "caption cut",
    "empty": "no caption",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMaker:
    """What all cards need. ``kinds``: Item.index -> keys of KINDS."""

    showings: Showings
    count_tokens: TokenCounter
    kinds: Mapping[int, Sequence[str]]

    def card(self, item: Item, pictures: SmallPictures) -> Html:
        examples = self.showings.examples(item)
        kinds = self.kinds.get(item.index, ())
        return element(
            "article",
            element("div", _original(item, pictures), _trained(item, pictures), class_="pair"),
            element("h4", element("bdi", item.path.name), title=item.path),
            element("p", _badges(item, pictures, kinds), class_="badges"),
            element("p", _sizes(item), class_="sizes"),
            self._captions(item, examples),
            _attributes(item),
            class_="card",
            id=card_id(item),
            data_kinds=" ".join(kinds),
        )

    def _captions(self, item: Item, examples: Sequence[CaptionExample]) -> Html:
        shown = [element("li", self._example(example, labelled=len(examples) > 1)) for example in examples]
        is_changed = any(example.text != item.caption for example in examples)
        as_read = element("details", element("summary", "as read"), _text(item.caption)) if is_changed and item.caption else None
        return joined([element("ol", shown, class_="captions"), as_read])

    def _example(self, example: CaptionExample, *, labelled: bool) -> Iterator[Html]:
        if labelled:
            yield element("span", f"epoch {example.epoch}, showing {example.occurrence + 1}", class_="when")
        uses = self.count_tokens(example.text)
        if example.text.strip():
            yield _text(example.text, uses)
        else:
            yield element("p", "dropped: the empty text" if example.dropped else "the empty text", class_="none")
        yield element("span", joined(_token_counts(uses)), class_="tokens")


def card_id(item: Item) -> str:
    return f"image-{item.index}"


def kinds_of_items(facts: Facts, showings: Showings) -> dict[int, list[str]]:
    """Which of KINDS each image is, for those that are any."""
    every = [item for dataset in facts.datasets for item in (*dataset.items, *dataset.validation)]
    members = {
        "validation": [item for item in every if showings.is_validation(item)],
        "reg": [item for item in every if item.subset.is_reg],
        "masked": [item for item in every if item.is_masked],
        "blank": facts.with_empty_mask,
        "enlarged": facts.enlarged,
        "cropped": facts.cropped,
        "duplicate": [item for group in facts.duplicates for item in group.items],
        "cut": [cut.item for cut in facts.cut],
        "empty": facts.without_caption,
    }
    kinds: dict[int, list[str]] = {}
    for kind in KINDS:
        for index in dict.fromkeys(item.index for item in members[kind]):
            kinds.setdefault(index, []).append(kind)
    return kinds


def times(size_wh: tuple[int, int]) -> str:
    return f"{size_wh[0]}\u00d7{size_wh[1]}"


def percent(share: float) -> str:
    return "under 1 %" if 0 < share < 0.01 else f"{share * 100:.0f} %"


def _original(item: Item, pictures: SmallPictures) -> Html:
    alt = f"{item.path.name} as it is in its file; the marked part is trained"
    image = element("img", src=pictures.original, alt=alt, decoding="async")
    return _figure([image, _crop(pictures)], item.size_wh, f"file {times(item.size_wh)}")


def _trained(item: Item, pictures: SmallPictures) -> Html:
    mirrored = ", mirrored" if pictures.flipped else ""
    image = element("img", src=pictures.trained, alt=f"{item.path.name} as it is trained{mirrored}", decoding="async")
    mask = None
    if pictures.mask is not None:
        mask = element("img", src=pictures.mask, class_="mask", alt="loss mask: what is covered does not count")
    return _figure([image, mask], item.bucket_wh, f"trained {times(item.bucket_wh)}{mirrored}")


def _figure(layers: Sequence[Html | None], size_wh: tuple[int, int], words: str) -> Html:
    ratio = f"--ratio:{size_wh[0] / size_wh[1]:.4f}"
    return element("figure", element("div", layers, class_="frame", style=ratio), element("figcaption", words))


def _crop(pictures: SmallPictures) -> Html:
    """A rectangle around what stays, and a shade over the rest; in pixels of the resized picture."""
    (width, height), (left, top) = pictures.placement.resized_wh, pictures.placement.crop_left_top
    across, down = pictures.placement.bucket_wh
    inner = f"M{left} {top}h{across}v{down}h{-across}z"
    return element(
        "svg",
        element("path", d=f"M0 0h{width}v{height}h{-width}z{inner}", class_="shade", fill_rule="evenodd"),
        element("path", d=inner, class_="edge"),
        class_="crop",
        viewBox=f"0 0 {width} {height}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _badges(item: Item, pictures: SmallPictures, kinds: Sequence[str]) -> Iterator[Html]:
    for kind in kinds:
        text = KINDS[kind]
        if kind == "enlarged":
            text = f"enlarged {item.scale:.2f}\u00d7"
        elif kind == "cropped":
            text = f"{percent(cut_away(item))} cut away"
        elif kind == "masked" and pictures.mask_mean is not None:
            text = f"masked: {percent(pictures.mask_mean)} counts"
        yield element("span", text, class_=f"badge {kind}")
    if pictures.flipped:
        yield element("span", "mirrored here", class_="badge")
    if pictures.recoloured:
        yield element("span", "colours changed here", class_="badge")


def _sizes(item: Item) -> str:
    way = " \u2192 ".join(map(times, (item.size_wh, item.resized_wh, item.bucket_wh)))
    facts = [way, f"scale {item.scale:.2f}"]
    facts += [f"{percent(cut_away(item))} cut away"] if cut_away(item) > 0 else []
    facts += [f"{item.repeats} repeats"] if item.repeats != 1 else []
    return " \u00b7 ".join(facts)


def _attributes(item: Item) -> Html | None:
    if not item.custom_attributes:
        return None
    rows = [[element("dt", name), element("dd", str(value))] for name, value in item.custom_attributes.items()]
    return element("dl", rows, class_="attributes")


def _text(text: str, uses: Sequence[TokenUse] = ()) -> Html:
    """A caption; what an encoder does not see any more is marked, what none of them sees is struck through."""
    return element("p", joined(_parts(text, uses)), class_="text", dir="auto", tabindex="0" if len(text) > LONG_CAPTION else None)


def _parts(text: str, uses: Sequence[TokenUse]) -> Iterator[str]:
    cuts = sorted({use.cut_at for use in uses if use.cut_at is not None})
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        blind = [use.encoder for use in uses if use.cut_at is not None and use.cut_at <= start]
        if start == end:
            continue
        elif not blind:
            yield text[start:end]
        else:
            words = f"not seen by {' and '.join(blind)}"
            yield element("del" if len(blind) == len(uses) else "mark", text[start:end], class_="lost", title=words)


def _token_counts(uses: Sequence[TokenUse]) -> Iterator[Html]:
    for use in uses:
        words = f"{use.encoder} {use.tokens:,} of {use.limit:,}" if use.cut_at is not None else f"{use.encoder} {use.tokens:,}"
        yield element(
            "span", words + (" tokens: cut" if use.cut_at is not None else ""), class_=None if use.cut_at is None else "over"
        )
