from __future__ import annotations

import torch

from library.training.optimizing.divergence import MAX_OVERFLOWS, MAX_SKIPPED_STEPS, WARNED_OVERFLOWS, DivergenceGuard
from library.training.optimizing.trained_weights import SNAPSHOT_EVERY, TrainedWeights
from library.training.running.meters import DelayedNumbers, HostFacts, LossAverage, StepNumbers


def test_numbers_come_one_step_later():
    numbers = DelayedNumbers()
    assert numbers.put(torch.tensor([1.0]), HostFacts({"lr": 0.1})) is None
    first = numbers.put(torch.tensor([2.0]), HostFacts({"lr": 0.2}))
    second = numbers.take()
    assert first is not None and (first.values, first.facts.curves) == ([1.0], {"lr": 0.1})
    assert second is not None and (second.values, second.facts.curves) == ([2.0], {"lr": 0.2})
    assert numbers.take() is None


def test_a_step_takes_from_its_begin_to_its_end_whenever_its_numbers_are_fetched(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    numbers, arrived = DelayedNumbers(), []
    for begin, end, fetched in ((1.0, 3.0, False), (3.0, 4.0, True), (10.0, 14.0, False)):
        now = end
        arrived.append(numbers.put(torch.tensor([0.0]), HostFacts(started=begin, images=8, waited_s=0.5)))
        now = end + 5
        if fetched:  # as before a validation
            arrived.append(numbers.take())
    arrived.append(numbers.take())
    speeds = [one.curves()["speed/images_per_s"] for one in arrived if one is not None]
    assert speeds == [4.0, 8.0, 2.0]


def test_the_average_is_over_one_epoch_and_survives_a_resume():
    average = LossAverage(3, [1.0, 2.0])
    average.add(3.0)
    average.add(4.0)
    assert average.mean == 3.0
    assert LossAverage(3, average.values()).mean == 3.0


def test_weights_count_as_good_once_their_loss_was_finite():
    weight = torch.nn.Parameter(torch.zeros(2))
    kept = TrainedWeights([weight])

    def update(step: int, *, finite: bool, value: float) -> None:
        kept.remember(step)
        weight.data.fill_(value)
        kept.learned(step, finite)

    for step in range(SNAPSHOT_EVERY + 1):
        update(step, finite=True, value=step + 1.0)
    for step in range(SNAPSHOT_EVERY + 1, 3 * SNAPSHOT_EVERY):
        update(step, finite=False, value=float("inf"))
    kept.restore_good()
    assert weight.tolist() == [float(SNAPSHOT_EVERY)] * 2  # the weights from before update number SNAPSHOT_EVERY


def test_a_step_that_is_not_finite_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(2))
    kept = TrainedWeights([weight])
    for finite, expected in ((False, 1.0), (True, 5.0)):
        kept.remember(1)
        weight.data.fill_(5.0)
        kept.keep_if(torch.tensor(finite))
        assert weight.tolist() == [expected] * 2


def numbers(step: int, *, loss: float = float("nan"), finite: bool = False) -> StepNumbers:
    return StepNumbers(step, loss, 1.0, finite, False, {})


def test_divergence_is_several_steps_in_a_row():
    guard = DivergenceGuard(scales_losses=False)
    outcomes = [guard.has_diverged(numbers(step, finite=step == 3)) for step in range(MAX_SKIPPED_STEPS + 4)]
    assert outcomes.index(True) == 3 + MAX_SKIPPED_STEPS


def test_overflows_of_fp16_are_a_search_until_they_are_far_too_many():
    guard = DivergenceGuard(scales_losses=True)
    outcomes = [guard.has_diverged(numbers(step, loss=0.5)) for step in range(MAX_OVERFLOWS)]
    assert outcomes.index(True) == MAX_OVERFLOWS - 1


def test_overflows_at_the_end_of_a_run():
    guard = DivergenceGuard(scales_losses=True)
    for step in range(1, WARNED_OVERFLOWS + 1):
        assert not guard.ends_in_skipped_steps
        guard.has_diverged(numbers(step, loss=0.5))
    assert guard.ends_in_skipped_steps
