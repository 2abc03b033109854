"""Looking at what would be trained, instead of training it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class LookOptions:
    """Look: show what would be trained, and end. Model files are not needed."""

    debug_dataset: bool = opt(
        False, "write an HTML page with the pictures, captions and buckets as they will be trained, and end"
    )
    show_timesteps: bool = opt(
        False, "draw the noise levels that training would use, and their weights, as a picture in --output_dir, and end"
    )
    show_captions: int | None = opt(
        None, "print N captions of each subset as the text encoder will get them, and end (not set = do not)"
    )

    @property
    def only(self) -> bool:
        """Nothing is trained."""
        return self.shows_dataset or self.show_timesteps

    @property
    def shows_dataset(self) -> bool:
        return self.debug_dataset or self.show_captions is not None

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "show_captions")
