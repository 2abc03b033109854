"""Examples of how images will be shown, drawn as the loader draws them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from library.dataset.captions import caption_variant, is_random
from library.dataset.clock import Moments
from library.dataset.items import Item
from library.dataset.showing import FixedShowing, Showing, TrainingShowing, When
from library.dataset.validation_split import without_chance

EXAMPLES = 3  # captions told of an image whose caption changes


@dataclass(frozen=True, slots=True)
class CaptionExample:
    """The text of one showing. ``dropped``: empty because the caption is dropped, not because there is none."""

    epoch: int  # 1-based
    occurrence: int
    text: str
    dropped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Showings:
    """Draws showings as a run with these settings does. ``variants``: of cached captions; None where none are cached."""

    seed: int
    variants: int | None = None
    moments: Moments
    validation_from: int  # Item.index of the first validation image
    steps_per_epoch: int
    epochs: int
    total_steps: int

    def is_validation(self, item: Item) -> bool:
        return item.index >= self.validation_from

    def showing(self, item: Item, occurrence: int = 0) -> Showing:
        if self.is_validation(item):
            return FixedShowing(item=item)
        when = When(seed=self.seed, epoch=self.epoch_of(item, occurrence), occurrence=occurrence)
        moment = self.moments.of(item.index, occurrence) if self._warms_up(item) else None
        return TrainingShowing(item=item, when=when, moment=moment)

    def examples(self, item: Item, count: int = EXAMPLES) -> list[CaptionExample]:
        """``count`` showings, the first ones, or from the start to the end of the run where the warm-up of tags makes the
        difference; a single one where all are the same."""
        if not self.varies(item):
            return [self._example(item, 0)]
        if self._warms_up(item):
            last = self.epochs * item.repeats - 1
            return [
                self._example(item, at) for at in dict.fromkeys(last * number // max(count - 1, 1) for number in range(count))
            ]
        return [self._example(item, occurrence) for occurrence in range(count)]

    def varies(self, item: Item) -> bool:
        """Whether two showings can have different captions."""
        subset = item.subset
        if self.is_validation(item):
            return False
        drops = subset.caption_dropout_rate > 0 or subset.caption_dropout_every_n_epochs > 0
        return drops or is_random(subset) or self._warms_up(item)

    @staticmethod
    def full_text(item: Item) -> str:
        """The caption with all of its tags in their order, which is what lengths are counted on; of wildcards one version."""
        return caption_variant(replace(item, subset=without_chance(item.subset)), 0)

    @staticmethod
    def epoch_of(item: Item, occurrence: int) -> int:
        return occurrence // item.repeats + 1

    def _warms_up(self, item: Item) -> bool:
        return item.subset.token_warmup_step > 0 and self.variants is None

    def _example(self, item: Item, occurrence: int) -> CaptionExample:
        showing = self.showing(item, occurrence)
        dropped = showing.is_caption_dropped
        if dropped:
            text = ""
        elif self.variants is None:
            text = showing.caption
        else:
            text = caption_variant(item, showing.variant(self.variants))
        return CaptionExample(self.epoch_of(item, occurrence), occurrence, text, dropped)
