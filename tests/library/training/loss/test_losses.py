from __future__ import annotations

import pytest
import torch

from library.options.loss import LossOptions
from library.training.loss.losses import LOSSES, elementwise_loss, flow_loss_weights, huber_threshold, per_sample_mean


def options(**changes) -> LossOptions:
    return LossOptions(**{"huber_schedule": "constant", **changes})


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_is_float32_and_zero_at_the_target(kind):
    target = torch.randn(2, 4, 3, 3)
    loss = elementwise_loss(target.bfloat16(), target.bfloat16(), options(loss_type=kind), timesteps=torch.tensor([0.0, 900.0]))
    assert loss.dtype == torch.float32
    assert not loss.any()


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_keeps_the_digits_of_small_differences(kind):
    difference = torch.full((1, 1, 1, 1), 1e-4)
    loss = elementwise_loss(difference, torch.zeros(1, 1, 1, 1), options(loss_type=kind), timesteps=torch.zeros(1))
    square = 1e-8 if kind == "huber" else 1e-8 / 0.1
    assert loss.item() == pytest.approx(square, rel=1e-4)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_gradient_is_finite_at_zero(kind):
    prediction = torch.zeros(1, 1, 2, 2, requires_grad=True)
    elementwise_loss(prediction, torch.zeros(1, 1, 2, 2), options(loss_type=kind), timesteps=torch.zeros(1)).sum().backward()
    assert torch.equal(prediction.grad, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(("c", "scale"), [(0.1, 1.0), (0.5, 1.0), (0.1, 3.0)])
def test_threshold_is_c_times_its_scale(c, scale):
    """Errors far below it count squared, errors far above it by their size: slope 1 times 2c of huber."""
    chosen = options(loss_type="huber", huber_c=c, huber_scale=scale)
    assert huber_threshold(chosen, torch.tensor([10.0, 900.0])).tolist() == pytest.approx([c * scale] * 2)
    errors = torch.tensor([1e-3 * c * scale, 1e3 * c * scale])
    small, large = elementwise_loss(errors, torch.zeros(2), chosen, timesteps=torch.tensor([10.0, 900.0]))
    assert small == pytest.approx(float(errors[0]) ** 2, rel=1e-3)
    assert large == pytest.approx(2 * c * scale * float(errors[1]), rel=1e-2)


def test_exponential_threshold_goes_from_one_to_c():
    threshold = huber_threshold(options(huber_schedule="exponential", huber_scale=2.0), torch.tensor([0.0, 500.0, 1000.0]))
    assert threshold.tolist() == pytest.approx([2.0, 2 * 0.1**0.5, 0.2], rel=1e-5)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none", "uniform", "logit_normal", "mode"])
def test_loss_weights_are_finite_everywhere(scheme):
    weights = flow_loss_weights(scheme, torch.tensor([0.0, 1e-6, 0.5, 1.0]))
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


def test_mask_multiplies_without_renormalising():
    loss = torch.ones(2, 4, 2, 2)
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0] = 1
    assert per_sample_mean(loss, mask).tolist() == [0.5, 0.0]
