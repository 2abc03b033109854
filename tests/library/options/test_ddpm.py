from __future__ import annotations

import pytest

from library.options.ddpm import DdpmTrainingOptions
from library.options.loss import LossOptions


def problems(**values) -> list[str]:
    return list(DdpmTrainingOptions(**values).problems())


def warnings(**values) -> list[str]:
    return list(DdpmTrainingOptions(**values).warnings())


@pytest.mark.parametrize(
    ("low", "high", "drawn"),
    [
        (None, None, range(1000)),
        (200, None, range(200, 1000)),
        (None, 600, range(600)),
        (990, 1000, range(990, 1000)),
        (555, 555, range(555, 556)),
        (700, 300, range(300, 301)),
        (None, 0, range(1)),
        (0, 0, range(1)),
        (999, None, range(999, 1000)),
    ],
)
def test_timesteps_that_are_drawn(low, high, drawn):
    assert problems(min_timestep=low, max_timestep=high) == []
    assert DdpmTrainingOptions(min_timestep=low, max_timestep=high).drawn == drawn


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"min_timestep": -1}, "--min_timestep is -1: give a timestep from 0 to 999"),
        ({"min_timestep": 1000}, "--min_timestep is 1000: give a timestep from 0 to 999"),  # else there would be a level 1000
        ({"max_timestep": 1001}, "--max_timestep is 1001: give 0 to 1000"),
        ({"max_timestep": -5}, "--max_timestep is -5: give 0 to 1000"),
        ({"min_snr_gamma": -1.0}, "--min_snr_gamma is -1.0: give 0 or more"),
        ({"v_pred_like_loss": -0.1}, "--v_pred_like_loss is -0.1: give 0 or more"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "--scale_v_pred_loss_like_noise_pred needs --v_parameterization"),
        ({"v_pred_like_loss": 0.5, "v_parameterization": True}, "--v_pred_like_loss=0.5 cannot be combined with"),
    ],
)
def test_refused(values, expected):
    found = problems(**values)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    "values",
    [
        {"min_snr_gamma": 5.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.1},
        {"v_parameterization": True, "scale_v_pred_loss_like_noise_pred": True, "zero_terminal_snr": True},
        {"v_parameterization": True, "min_snr_gamma": 0.0, "v_pred_like_loss": 0.0},
    ],
)
def test_allowed(values):
    assert problems(**values) == warnings(**values) == []


def test_zero_terminal_snr_is_for_velocity():
    assert warnings(zero_terminal_snr=True)[0].startswith("--zero_terminal_snr without --v_parameterization")


def test_a_range_upside_down_is_one_timestep():
    assert warnings(min_timestep=700, max_timestep=300) == [
        "--min_timestep is 700, above --max_timestep, which is 300: every image is trained at timestep 300"
    ]
    assert warnings(min_timestep=300, max_timestep=300) == []


def test_the_snr_threshold_has_no_scale():
    scaled = LossOptions(loss_type="huber", huber_scale=2.0)
    assert list(scaled.warnings()) == ["--huber_scale=2 does nothing with --huber_schedule=snr, whose threshold has no factor"]
    for other in (LossOptions(huber_scale=2.0), LossOptions(loss_type="huber", huber_schedule="constant", huber_scale=2.0)):
        assert not list(other.warnings())
