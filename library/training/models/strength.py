"""How strongly a network acts: its multiplier, from 0 (the model as if there were no network) to whatever a dataset asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from library.dataset.items import TrainingSet
from library.training.loss.preservation import is_preserved


def can_change_strength(network: Any) -> bool:
    """``set_multiplier`` is one of the protocol's optional calls."""
    return hasattr(network, "set_multiplier")


class NetworkStrength:
    """Sets the multiplier of a network where it is not what is wanted. Networks are created with 1.

    It must not change between a forward pass and its backward pass: gradient checkpointing computes the forward again.
    """

    def __init__(self, network: Any):
        self._network = network
        self._value = 1.0

    @property
    def can_change(self) -> bool:
        return can_change_strength(self._network)

    def set(self, value: float) -> None:
        if value != self._value:
            self._network.set_multiplier(value)
            self._value = value

    @contextmanager
    def at(self, value: float) -> Iterator[None]:
        before = self._value
        self.set(value)
        try:
            yield
        finally:
            self.set(before)


def strength_problems(network: Any, module: str | None, training_set: TrainingSet) -> Iterator[str]:
    """What the dataset asks for and a network without ``set_multiplier`` cannot do."""
    if can_change_strength(network):
        return
    for dataset in training_set.datasets:
        if dataset.network_multiplier != 1.0:
            value = dataset.network_multiplier
            yield f"{dataset.place}: network_multiplier is {value}, but {module} has one strength only: drop the key"
    preserved = [item for item in training_set.items if is_preserved(item.custom_attributes)]
    if preserved:
        yield (
            f"{len(preserved)} images such as {preserved[0].path} have the custom attribute diff_output_preservation, which "
            f"needs a network that can be switched off, and {module} cannot: drop the attribute, or use another network module"
        )
