"""``key=value`` arguments with literals as values."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.training.optimizing.literal_arguments import argument_problems, parse_literals


def test_several_arguments_in_one_word():
    with pytest.raises(OptionError) as caught:
        parse_literals(["weight_decay=0.1 betas=0.9,0.99"], flag="--optimizer_args")
    (problem,) = caught.value.problems
    assert problem.startswith("--optimizer_args 'weight_decay=0.1 betas=0.9,0.99' is one word, in which 2 arguments stand: write")
    assert "as separate words, with blanks between" in problem


def test_blanks_inside_a_value():
    assert parse_literals(["betas=0.9, 0.99", "text='a=1 b=2'"], flag="--x") == {"betas": (0.9, 0.99), "text": "a=1 b=2"}


def test_what_takes_no_arguments_says_so():
    (problem,) = argument_problems(lambda lr: None, {"foo": 1}, flag="--lr_scheduler_args", ours=("lr",))
    assert problem.endswith("has no argument foo; it takes none")
