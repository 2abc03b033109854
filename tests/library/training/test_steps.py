"""Counting steps, and where a run begins."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.options.resume import ResumeOptions
from library.training.steps import Progress, RunLength, initial_progress

LENGTH = RunLength(batches_per_epoch=7, accumulation=3, total_steps=12)  # 3 steps an epoch: 3 + 3 + 1 batches


def test_an_epoch_ends_with_a_smaller_update():
    assert LENGTH.steps_per_epoch == 3
    assert LENGTH.epochs == 4
    assert [LENGTH.batches_of_update(p) for p in range(4)] == [
        (1, range(0, 3)),
        (1, range(3, 6)),
        (1, range(6, 7)),
        (2, range(0, 3)),
    ]


def test_every_micro_batch_has_its_own_number():
    numbers = [
        LENGTH.micro_step(epoch, n) for p in range(12) for epoch, batches in [LENGTH.batches_of_update(p)] for n in batches
    ]
    assert numbers == list(range(28))


def test_epoch_ends():
    assert {p: LENGTH.ended_epoch(p) for p in range(10) if LENGTH.ended_epoch(p)} == {3: 1, 6: 2, 9: 3}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Progress(0, 0)),
        ({"initial_step": 5}, Progress(5, 3)),  # the data of epoch 2 from its beginning
        ({"initial_step": 5, "skip_until_initial_step": True}, Progress(5, 5)),
        ({"initial_epoch": 3}, Progress(6, 6)),
        ({"initial_epoch": 3, "skip_until_initial_step": True}, Progress(6, 6)),
        ({"initial_epoch": 3, "initial_step": 1, "skip_until_initial_step": True}, Progress(1, 1)),  # the step wins
    ],
)
def test_where_a_run_begins(options, expected):
    assert initial_progress(ResumeOptions(**options), LENGTH, None) == expected


def test_a_state_is_continued_unless_a_step_is_given():
    saved = Progress(4, 4)
    assert initial_progress(ResumeOptions(), LENGTH, saved) == saved
    assert initial_progress(ResumeOptions(initial_step=0), LENGTH, saved) == Progress(0, 0)


@pytest.mark.parametrize("options", [{"initial_step": 12}, {"initial_epoch": 5}])
def test_a_start_behind_the_end_is_an_error(options):
    with pytest.raises(OptionError, match="ends at step 12"):
        initial_progress(ResumeOptions(**options), LENGTH, None)


def test_the_end_of_a_run_ends_its_last_epoch():
    length = RunLength(batches_per_epoch=6, accumulation=2, total_steps=5)
    assert [length.left_epoch(Progress(step, step)) for step in range(1, 6)] == [None, None, 1, None, 2]
    assert length.left_epoch(Progress(5, 2)) == 1  # --initial_step 3, with the data from the beginning
    assert length.ended_by(Progress()) == (range(1, 6), range(1, 3))
    assert length.ended_by(Progress(4, 4)) == (range(5, 6), range(2, 3))
    assert length.ended_by(Progress(4, 0)) == (range(5, 6), range(1, 2))
