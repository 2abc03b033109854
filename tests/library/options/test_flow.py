from __future__ import annotations

import pytest

from library.options.declare import options_of
from library.options.flow import AnimaFlowOptions, FlowOptions, LuminaFlowOptions, Sd3FlowOptions

FLOWS = (AnimaFlowOptions, Sd3FlowOptions, LuminaFlowOptions)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(("values", "expected"), [
    ({"logit_std": 0.0}, "--logit_std is 0.0: give a number above 0"),
    ({"min_timestep": -1}, "--min_timestep is -1: give a timestep from 0 to 1000"),
    ({"max_timestep": 1001}, "--max_timestep is 1001"),
    ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep is 500, not below --max_timestep, which is 500"),
])  # fmt: skip
def test_what_cannot_be_drawn(flow: type[FlowOptions], values, expected):
    (problem,) = flow(**values).problems()
    assert expected in problem
    assert list(flow().problems()) == []


@pytest.mark.parametrize(("options", "flag"), [
    (Sd3FlowOptions(training_shift=0.0), "training_shift"), (LuminaFlowOptions(discrete_flow_shift=0.0), "discrete_flow_shift"),
    (LuminaFlowOptions(sigmoid_scale=-1.0), "sigmoid_scale"),
])  # fmt: skip
def test_shifts_and_spreads_are_above_zero(options, flag):
    (problem,) = options.problems()
    assert problem.startswith(f"--{flag} is") and "above 0" in problem


def test_defaults_are_those_of_the_reference():
    values = {flow: {option.name: option.default for option in options_of(flow)} for flow in FLOWS}
    shared = {"weighting_scheme": "uniform", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "min_timestep": None,
              "max_timestep": None}  # fmt: skip
    assert values[Sd3FlowOptions] == {**shared, "training_shift": 1.0}
    assert values[AnimaFlowOptions] == {
        **shared, "timestep_sampling": "sigmoid", "sigmoid_scale": 1.0, "discrete_flow_shift": 1.0
    }  # fmt: skip
    assert values[LuminaFlowOptions] == {
        **shared, "timestep_sampling": "shift", "sigmoid_scale": 1.0, "discrete_flow_shift": 6.0, "model_prediction_type": "raw"
    }  # fmt: skip


@pytest.mark.parametrize("values", [
    {}, {"model_prediction_type": "sigma_scaled", "weighting_scheme": "cosmap"}, {"weighting_scheme": "none"},
    {"timestep_sampling": "sigma", "weighting_scheme": "mode"},
])  # fmt: skip
def test_lumina_warns_of_nothing_that_acts(values):
    assert list(LuminaFlowOptions(**values).warnings()) == []


@pytest.mark.parametrize(("values", "expected"), [
    ({"model_prediction_type": "additive"}, "additive trains as raw does"),
    ({"weighting_scheme": "cosmap"}, "cosmap does nothing with --model_prediction_type=raw: it belongs to"),
    ({"weighting_scheme": "logit_normal"}, "logit_normal does nothing with --timestep_sampling=shift"),
    ({"weighting_scheme": "logit_normal", "logit_mean": 0.5}, "logit_normal does nothing with --timestep_sampling=shift"),
    ({"weighting_scheme": "sigma_sqrt", "timestep_sampling": "sigma"}, "sigma_sqrt does nothing with --model_prediction_type"),
])  # fmt: skip
def test_lumina_warns_of_what_does_nothing(values, expected):
    (warning,) = LuminaFlowOptions(**values).warnings()
    assert expected in warning


@pytest.mark.parametrize(("options", "expected"), [
    (Sd3FlowOptions(logit_mean=0.5, mode_scale=1.0), "--logit_mean=0.5, --mode_scale=1 do nothing with --weighting_scheme=uniform: "
     "noise levels are drawn without them"),
    (Sd3FlowOptions(logit_mean=0.5, mode_scale=1.0, weighting_scheme="logit_normal"),
     "--mode_scale=1 does nothing with --weighting_scheme=logit_normal: noise levels are drawn without it"),
    (AnimaFlowOptions(discrete_flow_shift=3.0), "--discrete_flow_shift=3 does nothing with --timestep_sampling=sigmoid and "),
    (AnimaFlowOptions(timestep_sampling="sigma", sigmoid_scale=2.0, discrete_flow_shift=3.0), "--sigmoid_scale=2 does nothing "),
    (LuminaFlowOptions(timestep_sampling="nextdit_shift", discrete_flow_shift=1.0, logit_std=2.0),
     "--logit_std=2, --discrete_flow_shift=1 do nothing with --timestep_sampling=nextdit_shift and --weighting_scheme=uniform"),
])  # fmt: skip
def test_what_is_changed_and_does_not_act_is_told_in_one_line(options, expected):
    (warning,) = options.warnings()
    assert expected in warning


@pytest.mark.parametrize("options", [
    Sd3FlowOptions(logit_mean=0.5, logit_std=2.0, weighting_scheme="logit_normal"), Sd3FlowOptions(training_shift=3.0),
    AnimaFlowOptions(sigmoid_scale=2.0), AnimaFlowOptions(timestep_sampling="shift", sigmoid_scale=2.0, discrete_flow_shift=3.0),
    LuminaFlowOptions(timestep_sampling="sigma", weighting_scheme="mode", mode_scale=1.0, discrete_flow_shift=1.0),
])  # fmt: skip
def test_what_acts_is_not_warned_of(options):
    assert list(options.warnings()) == []


def test_samplings_that_need_the_sizes_of_the_pictures():
    sized = {name for name in ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift")
             if LuminaFlowOptions(timestep_sampling=name).depends_on_sizes}  # fmt: skip
    assert sized == {"nextdit_shift", "flux_shift"} and not Sd3FlowOptions().depends_on_sizes


def test_options_that_act_are_told():
    assert Sd3FlowOptions(weighting_scheme="logit_normal", min_timestep=5).acting == (
        "training_shift", "weighting_scheme", "logit_mean", "logit_std", "min_timestep"
    )  # fmt: skip
    assert LuminaFlowOptions(timestep_sampling="sigma", weighting_scheme="mode").acting == (
        "timestep_sampling", "discrete_flow_shift", "weighting_scheme", "mode_scale", "model_prediction_type"
    )  # fmt: skip
    assert LuminaFlowOptions(weighting_scheme="mode").acting == (
        "timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "weighting_scheme", "model_prediction_type"
    )  # fmt: skip


@pytest.mark.parametrize(("options", "line"), [
    (Sd3FlowOptions(), "the loss compares guesses of the image; noise levels are drawn evenly, training_shift=1.0, timesteps 0 to 1000"),
    (Sd3FlowOptions(training_shift=3.0, weighting_scheme="logit_normal", min_timestep=100),
     "the loss compares guesses of the image; noise levels are drawn by training_shift=3.0, weighting_scheme=logit_normal, "
     "logit_mean=0.0, logit_std=1.0, timesteps 100 to 1000"),
    (AnimaFlowOptions(weighting_scheme="sigma_sqrt"),
     "the loss compares velocities; noise levels are drawn by timestep_sampling=sigmoid, sigmoid_scale=1.0, timesteps 0 to 1000; "
     "weighted by sigma_sqrt"),
    (LuminaFlowOptions(weighting_scheme="cosmap"),
     "the loss compares velocities; noise levels are drawn by timestep_sampling=shift, sigmoid_scale=1.0, discrete_flow_shift=6.0, "
     "timesteps 0 to 1000"),
    (LuminaFlowOptions(weighting_scheme="mode", timestep_sampling="sigma", model_prediction_type="sigma_scaled"),
     "the loss compares guesses of the image; noise levels are drawn by timestep_sampling=sigma, discrete_flow_shift=6.0, "
     "weighting_scheme=mode, mode_scale=1.29, timesteps 0 to 1000"),
])  # fmt: skip
def test_the_objective_is_what_counts(options: FlowOptions, line):
    assert options.objective == line
