"""The loss on images that are not trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least, share


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    """Validation: the loss on images that are kept out of training. A dataset file may set split and seed for each dataset."""

    validation_split: float = opt(0.0, "share of the images, 0 to 1, that validate instead of being trained (0 = none)")
    validation_seed: int | None = opt(
        None, "seed of the choice of validation images and of their noise (not set = --seed, else 0)"
    )
    validate_every_n_steps: int | None = opt(None, "validate after every N-th step (not set = not by steps)")
    validate_every_n_epochs: int | None = opt(None, "validate after every N-th epoch (not set = every epoch)")
    max_validation_steps: int | None = opt(None, "batches of validation images at most (not set = all)")
    save_best: bool = opt(False, "keep the LoRA with the lowest validation loss in a file of its own, <name>-best")

    def problems(self) -> Iterator[str]:
        yield from share(self, "validation_split")
        yield from at_least(self, 1, "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
