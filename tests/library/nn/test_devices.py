"""Devices by name, on machines that have them or not."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.nn import devices
from library.nn.devices import best_device, existing_device

MACHINES = {"none": {}, "one": {"cuda": 1}, "two": {"cuda": 2}, "apple": {"mps": 1}}


@pytest.fixture
def machine(monkeypatch):
    return lambda name: monkeypatch.setattr(devices, "device_count", lambda kind: MACHINES[name].get(kind, 0))


@pytest.mark.parametrize(
    ("name", "best", "there"),
    [("none", "cpu", ["cpu"]), ("one", "cuda", ["cpu", "cuda", "cuda:0"]), ("two", "cuda", ["cuda:1"]), ("apple", "mps", ["mps"])],
)  # fmt: skip
def test_what_is_there(machine, name, best, there):
    machine(name)
    assert best_device().type == best
    assert [str(existing_device(device, flag="--x")) for device in there] == there


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        ("none", "cuda:7", "--x cuda:7: this PyTorch .* finds no such device; there is cpu"),
        ("apple", "xpu", "--x xpu: .* there is mps and cpu"),
        ("one", "cuda:1", "--x cuda:1: there is no such device; of this kind there is cuda:0 alone"),
        ("two", "cuda:7", "of this kind there is cuda:0 to cuda:1"),
    ],
)
def test_what_is_not_there(machine, name, device, said):
    machine(name)
    with pytest.raises(OptionError, match=said):
        existing_device(device, flag="--x")
