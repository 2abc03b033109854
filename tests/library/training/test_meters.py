from __future__ import annotations

import torch

from library.training.good_weights import SNAPSHOT_EVERY, GoodWeights
from library.training.meters import DelayedNumbers, LossAverage


def test_numbers_come_one_step_later():
    numbers = DelayedNumbers()
    assert numbers.put(torch.tensor([1.0]), {"lr": 0.1}) is None
    assert numbers.put(torch.tensor([2.0]), {"lr": 0.2}) == ([1.0], {"lr": 0.1})
    assert numbers.take() == ([2.0], {"lr": 0.2})
    assert numbers.take() is None


def test_the_average_is_over_one_epoch_and_survives_a_resume():
    average = LossAverage(3, [1.0, 2.0])
    average.add(3.0)
    average.add(4.0)
    assert average.mean == 3.0
    assert LossAverage(3, average.values()).mean == 3.0


def test_weights_count_as_good_once_their_loss_was_finite():
    weight = torch.nn.Parameter(torch.zeros(2))
    good = GoodWeights([weight])

    def update(step: int, *, finite: bool, value: float) -> None:
        good.before_update(step)
        weight.data.fill_(value)
        good.learned(step, finite)

    for step in range(SNAPSHOT_EVERY + 1):
        update(step, finite=True, value=step + 1.0)
    for step in range(SNAPSHOT_EVERY + 1, 3 * SNAPSHOT_EVERY):
        update(step, finite=False, value=float("inf"))
    good.restore()
    assert weight.tolist() == [float(SNAPSHOT_EVERY)] * 2  # the weights from before update number SNAPSHOT_EVERY
