"""One image as one batch shows it: every choice that is made for it.

A training showing is drawn: each choice is a pure function of (seed, item, epoch, occurrence) and, for the warm-up of tags, of
the step. A fixed showing, for validation, has nothing to draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypedDict

from library.dataset.augment import ColourChange, colours_for, placement_for
from library.dataset.buckets import Placement
from library.dataset.captions import Moment, caption_for, caption_variant, is_dropped, variant_for
from library.dataset.items import Item
from library.dataset.order import is_flipped


class Showing(Protocol):
    """What a batch asks about each of its images. With cached latents nobody asks for placement and colours, with cached text
    nobody for the caption."""

    @property
    def item(self) -> Item: ...

    @property
    def loss_weight(self) -> float:
        """1.0 = counts fully."""

    @property
    def is_flipped(self) -> bool: ...

    @property
    def placement(self) -> Placement:
        """How the image is resized and cropped."""

    @property
    def colours(self) -> ColourChange | None: ...

    @property
    def is_caption_dropped(self) -> bool: ...

    @property
    def caption(self) -> str:
        """For a text encoder that runs at every step; empty where it is dropped."""

    def variant(self, variants: int) -> int:
        """Which of the cached ``variants`` of the caption is shown, where it is not dropped."""


class When(TypedDict):
    """What the random choices of a showing depend on beside the item. ``epoch`` is 1-based."""

    seed: int
    epoch: int
    occurrence: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingShowing:
    """A showing whose choices are drawn."""

    item: Item
    when: When
    moment: Moment | None  # None: token warm-up is over
    prior_loss_weight: float = field(default=1.0)  # of regularisation images

    @property
    def loss_weight(self) -> float:
        subset = self.item.subset
        return subset.loss_weight * (self.prior_loss_weight if subset.is_reg else 1.0)

    @cached_property
    def is_flipped(self) -> bool:
        return is_flipped(self.item, **self.when)

    @cached_property
    def placement(self) -> Placement:
        return placement_for(self.item, **self.when)

    @property
    def colours(self) -> ColourChange | None:
        return colours_for(self.item, **self.when)

    @property
    def is_caption_dropped(self) -> bool:
        return is_dropped(self.item, **self.when)

    @property
    def caption(self) -> str:
        return caption_for(self.item, **self.when, moment=self.moment)

    def variant(self, variants: int) -> int:
        return variant_for(self.item, **self.when, variants=variants)


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedShowing:
    """A showing without chance: the item's own crop and variant 0 of its caption. All weigh alike, so that the mean loss of a
    set is a plain one."""

    item: Item
    loss_weight: float = 1.0
    is_flipped: bool = False
    colours: None = None
    is_caption_dropped: bool = False

    @property
    def placement(self) -> Placement:
        return Placement.of(self.item)

    @property
    def caption(self) -> str:
        return caption_variant(self.item, 0)

    def variant(self, variants: int) -> int:
        return 0
