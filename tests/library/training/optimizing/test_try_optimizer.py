"""An optimizer that is only tried says nothing."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

from library.errors import OptionError
from library.options.optimizer import OptimizerOptions
from library.options.schedule import ScheduleOptions
from library.training.optimizing.learner import try_optimizer


class Talkative(torch.optim.SGD):
    def __init__(self, params, lr, **given):
        print("Using decoupled weight decay")
        print("to stderr", file=sys.stderr)
        warnings.warn("mind this", stacklevel=2)
        super().__init__(params, lr, **given)


def options(*arguments: str):
    chosen = OptimizerOptions(optimizer_type="talkative_package.Talkative", optimizer_args=list(arguments) or None)
    return SimpleNamespace(optimizer=chosen, schedule=ScheduleOptions())


@pytest.fixture(autouse=True)
def package(monkeypatch):
    module = ModuleType("talkative_package")
    module.Talkative = Talkative
    monkeypatch.setitem(sys.modules, "talkative_package", module)


def test_says_nothing(capsys, recwarn):
    assert try_optimizer(options(), 10).endswith("Talkative")
    assert capsys.readouterr() == ("", "") and not recwarn.list


def test_mistakes_are_still_told():
    with pytest.raises(OptionError, match="cannot be made with momentum=-1"):
        try_optimizer(options("momentum=-1"), 10)
