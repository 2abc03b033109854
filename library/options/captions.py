"""How captions are read and varied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least, share


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionOptions:
    """Captions: reading, shuffling and dropping. A dataset file may say otherwise for each subset."""

    caption_extension: str = opt(".caption", "ending of the caption files beside the images, often .txt")
    caption_extention: str | None = opt(None, "the older spelling of --caption_extension; wins when given")
    shuffle_caption: bool = opt(False, "put the tags of a caption in another order each time it is used")
    caption_separator: str = opt(",", "text that separates the tags of a caption")
    keep_tokens: int = opt(0, "number of leading tags that are neither shuffled nor dropped (0 = none)")
    keep_tokens_separator: str = opt(
        "", "marker in a caption: tags before it (and after a second one) stay in place (empty = no marker)"
    )
    secondary_separator: str | None = opt(
        None, "separator inside a tag, for tags that stay together; becomes --caption_separator at last"
    )
    enable_wildcard: bool = opt(False, "pick one of {a|b|c} and one line of a caption file of several lines, each time anew")
    caption_prefix: str | None = opt(None, "text put before every caption (not set = none)")
    caption_suffix: str | None = opt(None, "text put after every caption (not set = none)")
    caption_dropout_rate: float = opt(0.0, "share of uses, 0 to 1, in which a caption is replaced by the empty text (0 = never)")
    caption_dropout_every_n_epochs: int = opt(0, "every N-th epoch uses the empty text for all captions (0 = never)")
    caption_tag_dropout_rate: float = opt(0.0, "chance, 0 to 1, that a tag is left out when a caption is used (0 = never)")
    token_warmup_min: int = opt(1, "tags in use at the first step of --token_warmup_step, besides the kept ones")
    token_warmup_step: float = opt(
        0.0, "step from which on all tags are used, growing until then; below 1 = share of the run (0 = all from the start)"
    )

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_min", "token_warmup_step")
        yield from share(self, "caption_dropout_rate", "caption_tag_dropout_rate")
        for name in ("caption_separator", "caption_extension"):
            if not getattr(self, name):
                yield f"--{name} is empty: leave it out for the default, or give a text"
