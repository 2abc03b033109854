from __future__ import annotations

import subprocess
import sys

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.optimizer import OptimizerOptions
from library.options.sd import SdxlTrainOptions
from library.training.optimizing.optimizer_names import (
    NAMED_OPTIMIZERS,
    optimizer_arguments,
    optimizer_kind,
    optimizer_notices,
    optimizer_problems,
    optimizer_source,
    rate_problems,
    torch_optimizer_names,
    used_rates,
)

RESOLVED = {
    "": "torch.optim.AdamW",
    "AdamW": "torch.optim.AdamW",
    "adamw8BIT": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "pagedlion8bit": "bitsandbytes.optim.PagedLion8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "lion": "lion_pytorch.Lion",
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "PRODIGY": "prodigyopt.Prodigy",
    "adafactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "Adam": "torch.optim.Adam",
    "NAdam": "torch.optim.NAdam",
    "torch.optim.Adafactor": "torch.optim.Adafactor",
    "bitsandbytes.optim.Adam8bit": "bitsandbytes.optim.Adam8bit",
}


def options(name: str = "", *arguments: str, **changes) -> OptimizerOptions:
    return OptimizerOptions(optimizer_type=name, optimizer_args=list(arguments) or None, **changes)


@pytest.mark.parametrize("name", RESOLVED)
def test_names(name):
    assert optimizer_source(options(name)).path == RESOLVED[name]


def test_older_flags():
    assert optimizer_source(OptimizerOptions(use_8bit_adam=True)).class_name == "AdamW8bit"
    assert optimizer_source(OptimizerOptions(use_lion_optimizer=True)).class_name == "Lion"


def test_torch_names_are_those_of_torch():
    import torch

    names = torch_optimizer_names()
    assert {"Adam", "AdamW", "SGD", "RMSprop"} <= set(names)
    assert all(issubclass(getattr(torch.optim, name), torch.optim.Optimizer) for name in names)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("adam", "Adam"), ("AdamW8bits", "AdamW8bit"), ("Adafacter", "Adafactor"), ("ADAM", "Adam")]
)
def test_unknown_name(name, suggestion):
    (problem,) = optimizer_problems(options(name))
    assert f"--optimizer_type {name} is not known (did you mean {suggestion}?)" in problem


def test_unknown_torch_class():
    assert "did you mean AdamW?" in optimizer_problems(options("torch.optim.AdamWW"))[0]


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_classes_that_cannot_train_a_lora(name):
    assert "use AdamW" in optimizer_problems(options(name))[0]


@pytest.mark.parametrize(
    ("name", "module", "pip"),
    [
        ("Prodigy", "prodigyopt", "prodigyopt"),
        ("Lion", "lion_pytorch", "lion-pytorch"),
        ("AdamW8bit", "bitsandbytes", "bitsandbytes"),
    ],
)
def test_missing_package_names_the_pip_command(name, module, pip, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    (problem,) = optimizer_problems(options(name))
    assert f"pip install {pip}" in problem


def test_missing_package_of_a_class_path():
    assert "needs the package no_such_package_here" in optimizer_problems(options("no_such_package_here.optim.Best"))[0]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("weight_decay", "is not key=value"),
        ("=3", "is not key=value"),
        ("amsgrad=true", "write amsgrad=True"),
        ("betas=0.9;0.99", "is not a Python value"),
        ("name=__import__('os')", "is not a Python value"),
    ],
)
def test_bad_arguments(argument, expected):
    (problem,) = optimizer_problems(options("AdamW", argument))
    assert expected in problem
    assert "--optimizer_args" in problem


def test_problems_are_reported_together():
    assert len(optimizer_problems(options("Adamm", "a", "b=x"))) == 3


def test_arguments_are_python_values():
    arguments = optimizer_arguments(options("AdamW", "betas=0.9,0.99", "weight_decay = 0.1", "amsgrad=True", "note='a=b'"))
    assert arguments == {"betas": (0.9, 0.99), "weight_decay": 0.1, "amsgrad": True, "note": "a=b"}


def test_momentum_default():
    assert optimizer_arguments(options("SGDNesterov")) == {"momentum": 0.9, "nesterov": True}
    assert optimizer_arguments(options("SGDNesterov8bit", "momentum=0.5"))["momentum"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "relative"),
    [
        ((), True),
        (("relative_step=True",), True),
        (("relative_step=False",), False),
        (("relative_step=False", "warmup_init=True"), True),
        (("relative_step=False", "warmup_init=False"), False),
    ],
)
def test_adafactor_relative_steps(arguments, relative):
    made = options("Adafactor", *arguments)
    assert optimizer_arguments(made)["relative_step"] is relative
    assert optimizer_kind(made) == ("adafactor_relative" if relative else "plain")
    assert bool(optimizer_notices(made, [1e-4])) is relative


def test_kinds():
    assert optimizer_kind(options("radamschedulefree")) == "schedule_free"
    assert optimizer_kind(options("somewhere.MyScheduleFree")) == "schedule_free"
    assert optimizer_kind(options("torch.optim.Adafactor")) == "plain"
    assert {optimizer_kind(options(name)) for name in NAMED_OPTIMIZERS} == {"plain", "schedule_free", "adafactor_relative"}


@pytest.mark.parametrize(
    ("flags", "low"),
    [("--learning_rate=1e-4", "0.0001"), ("--learning_rate=1", ""), ("--unet_lr=1 --network_train_unet_only", ""),
     ("--unet_lr=1 --text_encoder_lr=1", ""), ("--learning_rate=1 --unet_lr=1e-3 --network_train_unet_only", "0.001")],
)  # fmt: skip
def test_step_size_finders_expect_a_rate_of_one(flags, low):
    given = sdxl("--optimizer_type=Prodigy", *flags.split())
    notices = optimizer_notices(given.optimizer, used_rates(given))
    assert notices == ([f"Prodigy finds its own step size and expects the learning rate 1.0; it is {low}"] if low else [])


def sdxl(*flags):
    paths = "--pretrained_model_name_or_path=x --dataset_config=x --output_dir=x --network_module=networks.lora"
    return read_options(SdxlTrainOptions, [*paths.split(), *flags])


@pytest.mark.parametrize(
    ("flags", "rates"),
    [("--learning_rate=1", ""), ("--unet_lr=1 --text_encoder_lr=0.5", "0.5 and 1"), ("--unet_lr=1", "2e-06 and 1"),
     ("--unet_lr=1 --network_train_unet_only", ""), ("--learning_rate=1 --text_encoder_lr1=0", ""),
     ("--unet_lr=1 --text_encoder_lr=0.5 --network_train_text_encoder_only", "")],
)  # fmt: skip
def test_step_size_finders_take_one_rate(flags, rates):
    problems = list(rate_problems(sdxl("--optimizer_type=DAdaptAdam", *flags.split())))
    assert len(problems) == bool(rates) and all(
        f"have the learning rates {rates}: give all the same" in text for text in problems
    )
    assert list(rate_problems(sdxl("--optimizer_type=AdamW", *flags.split()))) == []
    assert list(rate_problems(sdxl("--optimizer_type=Unknown", *flags.split()))) == []


def test_unknown_name_raises_too():
    with pytest.raises(OptionError, match="is not known"):
        optimizer_source(options("Nothing"))


def test_needs_no_torch():
    code = (
        "import sys; from library.options.optimizer import OptimizerOptions as O; from library.options.schedule import ScheduleOptions as S;"
        "from library.training.optimizing.optimizer_names import optimizer_problems; from library.training.optimizing.schedule_names import schedule_problems;"
        "assert optimizer_problems(O(optimizer_type='Adan')); assert schedule_problems(S(lr_scheduler='cosin'), O());"
        "assert schedule_problems(S(lr_scheduler_type='CosineAnealingLR'), O());"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
