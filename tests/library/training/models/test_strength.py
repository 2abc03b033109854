"""The multiplier of a network is set where it changes, and put back."""

from __future__ import annotations

import pytest

from library.training.models.strength import NetworkStrength


class Network:
    def __init__(self):
        self.calls: list[float] = []

    def set_multiplier(self, value: float) -> None:
        self.calls.append(value)


def test_only_changes_are_told_to_the_network():
    network = Network()
    strength = NetworkStrength(network)
    strength.set(1.0)
    assert network.calls == []
    for value in (0.5, 0.5, 1.0):
        strength.set(value)
    assert network.calls == [0.5, 1.0]


def test_what_was_set_comes_back_whatever_happens():
    network = Network()
    strength = NetworkStrength(network)
    strength.set(0.5)
    with pytest.raises(KeyError), strength.at(0.0):
        raise KeyError
    assert network.calls == [0.5, 0.0, 0.5]


def test_a_network_of_one_strength_is_never_called():
    strength = NetworkStrength(object())
    assert not strength.can_change
    with strength.at(1.0):
        strength.set(1.0)
