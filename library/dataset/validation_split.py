"""Which images validate, and what is left of their subsets' settings once nothing is left to chance."""

from __future__ import annotations

from dataclasses import replace

from library.dataset.items import SubsetSettings


def without_chance(subset: SubsetSettings) -> SubsetSettings:
    """The settings of validation images: each is shown once, always in the same way.

    Flips, colour changes, random crops and every kind of caption dropout are off, and tags stay in order. Where training would
    have handled the tags (shuffled, dropped or warmed them up), ``tags_joined`` is set: the caption is still cut at
    keep_tokens_separator and at commas and joined with ", ", because that is the form which the network sees in training.
    Wildcards stay: variant 0 of the caption is used.
    """
    tags_handled = subset.shuffle_caption or subset.caption_tag_dropout_rate > 0 or subset.token_warmup_step > 0
    return replace(
        subset,
        num_repeats=1,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_min=1,
        token_warmup_step=0.0,
        tags_joined=subset.tags_joined or tags_handled,
    )
