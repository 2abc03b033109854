"""From the caption as read to the text that is trained: prefix, wildcards, tags, dropout, warm-up.

Every random choice is a pure function of the seed, the item and the showing; nothing here keeps state. Emphasis such as
``(red:1.2)`` or ``[blue]`` is text like any other here: only where tags are split is it cut at a comma inside it, as in the
reference.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from library.dataset.items import Item, SubsetSettings
from library.randomness import python_random, uniform

WILDCARD = re.compile(r"\{([^}]+)\}")  # {a|b|c}, one level deep
# Stand-ins for the escaped braces {{ and }} while wildcards are expanded: lone surrogates, which no UTF-8 text can hold.
LEFT_BRACE, RIGHT_BRACE = "\ud800", "\ud801"
JOINT = ", "  # between tags, whatever separated them before


@dataclass(frozen=True, slots=True)
class TagParts:
    """A caption cut into tags. Only the flexible ones are shuffled and dropped."""

    head: list[str]
    flexible: list[str]
    tail: list[str]


@dataclass(frozen=True, slots=True)
class Moment:
    """When in a run something is shown: ``step`` optimizer steps of the ``total_steps`` of the run lie before it."""

    step: int
    total_steps: int


def caption_for(item: Item, *, seed: int, epoch: int, occurrence: int, moment: Moment | None = None) -> str:
    """The text of one showing of an image when the text encoder runs at every step; empty where the caption is dropped.

    ``moment`` matters for the warm-up of tags only; None: it is over.
    """
    if is_dropped(item, seed=seed, epoch=epoch, occurrence=occurrence):
        return ""
    rng = python_random("caption", seed, item.key, occurrence) if is_random(item.subset) else None
    return render_caption(item.caption, item.subset, rng, moment=moment)


def caption_variant(item: Item, variant: int) -> str:
    """Variant 0, 1, 2 ... of the caption, for cached text and for validation: depends on the item and the number, never on the
    seed. Tags are all there: what is cached knows no steps."""
    rng = python_random("caption variant", item.key, variant) if is_random(item.subset) else None
    return render_caption(item.caption, item.subset, rng)


def variant_for(item: Item, *, seed: int, epoch: int, occurrence: int, variants: int) -> int:
    """Which of ``variants`` cached captions one showing uses: all of them once, in random order, then all of them again.

    Always 0 for a caption that never changes.
    """
    if variants <= 1 or not is_random(item.subset):
        return 0
    turn, position = divmod(occurrence, variants)
    order = list(range(variants))
    python_random("order of caption variants", seed, item.key, turn).shuffle(order)
    return order[position]


def is_dropped(item: Item, *, seed: int, epoch: int, occurrence: int) -> bool:
    """Whether one showing trains with an empty caption. ``epoch`` is 1-based."""
    every = item.subset.caption_dropout_every_n_epochs
    if every > 0 and epoch % every == 0:
        return True
    rate = item.subset.caption_dropout_rate
    return rate >= 1 or (rate > 0 and uniform("caption dropout", seed, item.key, occurrence) < rate)


def is_random(subset: SubsetSettings) -> bool:
    """Whether two showings of one image in the same step can have different captions (dropout of the whole caption aside).

    Token warm-up is not random: captions grow with the steps, which is why text cannot be cached with it.
    """
    return subset.shuffle_caption or subset.enable_wildcard or 0 < subset.caption_tag_dropout_rate < 1


def possible_variants(item: Item, *, limit: int) -> int:
    """An upper bound, at most ``limit``, of how many different captions the item can have once token warm-up is over: 1 means
    that it never changes then."""
    subset = item.subset
    if not is_random(subset):
        return 1
    lines = item.caption.split("\n") if subset.enable_wildcard else item.caption.split("\n")[:1]
    total = 0
    for line in lines:
        total += _line_variants(line, subset, limit=limit)
        if total >= limit:
            return limit
    return max(total, 1)


def render_caption(caption: str, subset: SubsetSettings, rng: random.Random | None, *, moment: Moment | None = None) -> str:
    """Applies everything but the dropout of the whole caption.

    ``caption`` may have several lines: a random one is taken with wildcards on, the first one otherwise. ``rng`` may be None
    only where ``is_random`` is false, ``moment`` where token warm-up is over. Unlike in the reference, prefix and suffix belong
    to every line, not to the first and the last.
    """
    text = _add_prefix_and_suffix(_choose_line(caption, subset, rng), subset)
    if subset.enable_wildcard:
        text = _expand_wildcards(text, _required(rng))
    if _tags_are_handled(subset):
        text = _handle_tags(text, subset, rng, moment)
    if subset.secondary_separator:
        text = text.replace(subset.secondary_separator, subset.caption_separator)
    return text


def _required(rng: random.Random | None) -> random.Random:
    if rng is None:
        raise ValueError("a caption with random parts needs a random source")
    return rng


def _choose_line(caption: str, subset: SubsetSettings, rng: random.Random | None) -> str:
    if "\n" not in caption:
        return caption
    lines = caption.split("\n")
    return _required(rng).choice(lines) if subset.enable_wildcard else lines[0]


def _add_prefix_and_suffix(text: str, subset: SubsetSettings) -> str:
    if subset.caption_prefix:
        text = f"{subset.caption_prefix} {text}"
    if subset.caption_suffix:
        text = f"{text} {subset.caption_suffix}"
    return text


def _expand_wildcards(text: str, rng: random.Random) -> str:
    text = text.replace("{{", LEFT_BRACE).replace("}}", RIGHT_BRACE)
    text = WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    return text.replace(LEFT_BRACE, "{").replace(RIGHT_BRACE, "}")


def _tags_are_handled(subset: SubsetSettings) -> bool:
    """Otherwise the text passes untouched: its spacing, and even a keep-tokens marker, stay as they are."""
    return (
        subset.shuffle_caption
        or subset.caption_tag_dropout_rate > 0
        or subset.token_warmup_step > 0  # also when it is over: the form of the caption stays the same
        or subset.tags_joined
    )


def _handle_tags(text: str, subset: SubsetSettings, rng: random.Random | None, moment: Moment | None) -> str:
    parts = split_tags(text, subset)
    flexible = parts.flexible
    if moment is not None and subset.token_warmup_step > 0:
        flexible = flexible[: warmed_up_tags(len(flexible), subset, moment)]
    if subset.shuffle_caption:
        flexible = _required(rng).sample(flexible, len(flexible))
    flexible = _drop_tags(flexible, subset.caption_tag_dropout_rate, rng)
    return JOINT.join([*parts.head, *flexible, *parts.tail])


def split_tags(text: str, subset: SubsetSettings) -> TagParts:
    """Cuts at caption_separator; keep_tokens_separator (where the text has it) or keep_tokens says which tags are fixed."""
    marker = subset.keep_tokens_separator
    if not marker or marker not in text:
        tags = [tag.strip() for tag in text.strip().split(subset.caption_separator)]
        return TagParts(tags[: subset.keep_tokens], tags[subset.keep_tokens :], [])

    def tags_of(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(subset.caption_separator) if tag.strip()]

    head, _, rest = text.partition(marker)
    middle, _, tail = rest.partition(marker)
    return TagParts(tags_of(head), tags_of(middle), tags_of(tail))


def warmed_up_tags(count: int, subset: SubsetSettings, moment: Moment) -> int:
    """How many of ``count`` flexible tags are used at a moment: token_warmup_min at step 0, evenly more until all are used from
    token_warmup_step on. A token_warmup_step below 1 is a share of the run."""
    last = subset.token_warmup_step
    if last < 1:
        last = math.floor(last * moment.total_steps)
    if moment.step >= last:
        return count
    fewest = subset.token_warmup_min
    return min(count, math.floor(moment.step * (count - fewest) / last) + fewest)


def _drop_tags(tags: list[str], rate: float, rng: random.Random | None) -> list[str]:
    if rate <= 0:
        return tags
    if rate >= 1:
        return []
    return [tag for tag in tags if _required(rng).random() >= rate]


def _line_variants(line: str, subset: SubsetSettings, *, limit: int) -> int:
    """Alternatives of every wildcard * orders of the flexible tags * subsets of them; an upper bound."""
    text = _add_prefix_and_suffix(line, subset)
    choices = 1
    wildcards = WILDCARD.findall(text.replace("{{", "").replace("}}", "")) if subset.enable_wildcard else []
    for alternatives in wildcards:
        choices *= len(set(alternatives.split("|")))
    if _tags_are_handled(subset):
        # A wildcard may bring separators of its own, so then every tag in sight counts as flexible.
        flexible = text.count(subset.caption_separator) + 1 if wildcards else len(split_tags(text, subset).flexible)
        flexible = min(flexible, limit)  # limit! is more than enough
        choices *= math.factorial(min(flexible, 20)) if subset.shuffle_caption else 1
        choices *= 2 ** min(flexible, 64) if 0 < subset.caption_tag_dropout_rate < 1 else 1
    return min(choices, limit)
