from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.options.optimizer import OptimizerOptions
from library.options.schedule import ScheduleOptions
from library.training.optimizing.optimizers import create_optimizer
from library.training.optimizing.schedule_names import NAMED_SCHEDULES, schedule_notices, schedule_problems, step_count
from library.training.optimizing.schedules import create_schedule

ADAMW = OptimizerOptions(learning_rate=1.0)
ADAFACTOR = OptimizerOptions(optimizer_type="Adafactor", learning_rate=0.25)
PIECES = "step_rules='1:10,0.1:20,0.01'"
TOTAL = 40
NAMES = [name for name in NAMED_SCHEDULES if name != "adafactor"]


def schedule_options(name: str = "constant", **changes) -> ScheduleOptions:
    if name == "piecewise_constant":
        changes.setdefault("lr_scheduler_args", [PIECES])
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        changes.setdefault("lr_scheduler_min_lr_ratio", 0.1)
    return ScheduleOptions(lr_scheduler=name, **changes)


def make(options: ScheduleOptions, optimizer: OptimizerOptions = ADAMW, total: int = TOTAL):
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))]
    made = create_optimizer([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], optimizer).optimizer
    return made, create_schedule(made, options, total_steps=total, optimizer=optimizer)


def rates(options: ScheduleOptions, total: int = TOTAL) -> list[float]:
    """Of the first group, for each step of the run."""
    optimizer, schedule = make(options, total=total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr()[1] == pytest.approx(seen[-1] / 2)
        optimizer.step()
        schedule.step()
    return seen


def test_constant():
    assert set(rates(schedule_options())) == {1.0}


def test_constant_with_warmup():
    seen = rates(schedule_options("constant_with_warmup", lr_warmup_steps=10))
    assert seen[:3] == pytest.approx([0, 0.1, 0.2])
    assert set(seen[10:]) == {1.0}


def test_warmup_as_a_share_of_the_run():
    options = schedule_options("constant_with_warmup", lr_warmup_steps=0.25)
    assert rates(options) == rates(schedule_options("constant_with_warmup", lr_warmup_steps=10))


def test_linear():
    seen = rates(schedule_options("linear", lr_warmup_steps=10))
    assert seen[10] == 1.0
    assert seen[25] == pytest.approx(0.5)
    assert seen[39] == pytest.approx(1 / 30)


def test_cosine():
    assert rates(schedule_options("cosine"))[20] == pytest.approx(0.5)


def test_cosine_with_restarts():
    seen = rates(schedule_options("cosine_with_restarts", lr_scheduler_num_cycles=2))
    assert seen[10] == pytest.approx(0.5)
    assert seen[20] == pytest.approx(1.0)


def test_polynomial():
    seen = rates(schedule_options("polynomial", lr_scheduler_power=2))
    assert seen[20] == pytest.approx(0.25, abs=1e-3)


def test_inverse_sqrt():
    seen = rates(schedule_options("inverse_sqrt", lr_scheduler_timescale=5))
    assert seen[15] == pytest.approx(math.sqrt(5 / 20))


def test_cosine_with_min_lr():
    seen = rates(schedule_options("cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.2))
    assert seen[20] == pytest.approx(0.6)
    assert min(seen) > 0.2


def test_warmup_stable_decay():
    options = schedule_options("warmup_stable_decay", lr_warmup_steps=10, lr_decay_steps=0.25, lr_scheduler_min_lr_ratio=0.1)
    seen = rates(options)
    assert set(seen[10:30]) == {1.0}
    assert seen[35] == pytest.approx(0.55)


def test_piecewise_constant():
    seen = rates(schedule_options("piecewise_constant"))
    assert seen == [1.0] * 10 + [0.1] * 10 + [0.01] * 20


def test_class_of_torch():
    seen = rates(ScheduleOptions(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=10", "gamma=0.5"]))
    assert seen[::10] == [1.0, 0.5, 0.25, 0.125]
    whole_path = ScheduleOptions(
        lr_scheduler_type="torch.optim.lr_scheduler.StepLR", lr_scheduler_args=["step_size=10", "gamma=0.5"]
    )
    assert rates(whole_path) == seen


def test_arguments_of_the_command_line_win():
    seen = rates(schedule_options("cosine", lr_scheduler_args=["num_cycles=1.0"]))
    assert seen[20] == pytest.approx(0)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_uninterrupted(name):
    options = schedule_options(name)
    optimizer, schedule = make(options)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    other_optimizer, other = make(options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(7):
        for made, its_schedule in ((optimizer, schedule), (other_optimizer, other)):
            made.step()
            its_schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other_optimizer.param_groups]


def test_adafactor_tells_its_rates():
    optimizer, schedule = make(schedule_options("adafactor"), ADAFACTOR)
    assert schedule.get_last_lr() == [0.25, 0.25]
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(4, 4)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.01, 0.01], rel=0.1)
    assert float(optimizer.param_groups[0]["lr"]) == schedule.get_last_lr()[0]
    assert schedule.state_dict() == {}


def test_adafactor_trains_the_same_without_the_rates_in_its_groups():
    results = []
    for watched in (True, False):
        optimizer, schedule = make(schedule_options("cosine"), ADAFACTOR)
        for _ in range(3):
            optimizer.param_groups[0]["params"][0].grad = torch.arange(16.0).reshape(4, 4)
            optimizer.step()
            if watched:
                schedule.step()
        results.append(optimizer.param_groups[0]["params"][0].detach())
    assert torch.equal(*results)


def test_schedule_free_optimizers_keep_their_rates():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.3)
    schedule = create_schedule(
        optimizer, schedule_options("cosine"), total_steps=5, optimizer=OptimizerOptions(optimizer_type="AdamWScheduleFree")
    )
    schedule.step()
    schedule.load_state_dict(schedule.state_dict())
    assert schedule.get_last_lr() == [0.3]


def test_step_count():
    assert [step_count(value, 200) for value in (0, 30, 0.1, 0.999, 1.0)] == [0, 30, 20, 199, 200]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_accepted_and_made(name):
    options = schedule_options(name)
    assert schedule_problems(options, ADAMW) == []
    assert make(options)[1].get_last_lr()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (schedule_options("cosin"), "--lr_scheduler cosin is not known (did you mean cosine?)"),
        (schedule_options("reduce_lr_on_plateau"), "validation loss"),
        (schedule_options("greedy"), "validation loss"),
        (schedule_options("adafactor"), "goes with --optimizer_type Adafactor"),
        (ScheduleOptions(lr_scheduler="cosine_with_min_lr"), "give --lr_scheduler_min_lr_ratio"),
        (ScheduleOptions(lr_scheduler="piecewise_constant"), "step_rules, which is missing"),
        (schedule_options("piecewise_constant", lr_scheduler_args=["step_rules='1:x,2'"]), "step_rules, which is '1:x,2'"),
        (schedule_options("piecewise_constant", lr_warmup_steps=5), "has no warm-up"),
        (schedule_options(lr_scheduler_args=["gamma"]), "--lr_scheduler_args 'gamma' is not key=value"),
        (ScheduleOptions(lr_scheduler_type="CosineAnealingLR"), "did you mean CosineAnnealingLR?"),
        (ScheduleOptions(lr_scheduler_type="ReduceLROnPlateau"), "validation loss"),
        (ScheduleOptions(lr_scheduler_type="no_such_package_here.Schedule"), "is not installed"),
    ],
)
def test_problems(options, expected):
    (problem,) = schedule_problems(options, ADAMW)
    assert expected in problem


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            schedule_options("linear", lr_scheduler_args=["gamma=1"]),
            "has no argument gamma; it takes num_training_steps, num_warmup",
        ),
        (ScheduleOptions(lr_scheduler_type="StepLR"), "the learning-rate schedule StepLR cannot be made: .*step_size"),
        (ScheduleOptions(lr_scheduler_type="torch.optim.lr_scheduler.Nope"), "has no class Nope"),
        (schedule_options("warmup_stable_decay", lr_warmup_steps=30, lr_decay_steps=20), "are longer than the run of 40 steps"),
    ],
)
def test_problems_that_show_when_it_is_made(options, expected):
    with pytest.raises(OptionError, match=expected):
        make(options)


@pytest.mark.parametrize(
    ("options", "optimizer", "expected"),
    [
        (schedule_options("cosine", lr_scheduler_power=2.0), ADAMW, "--lr_scheduler_power: not used by --lr_scheduler cosine"),
        (
            ScheduleOptions(lr_scheduler="cosine", lr_scheduler_type="StepLR"),
            ADAMW,
            "--lr_scheduler: not used, --lr_scheduler_type StepLR",
        ),
        (schedule_options("cosine"), ADAFACTOR, "--lr_scheduler: not used, Adafactor with relative_step"),
        (
            schedule_options("cosine"),
            OptimizerOptions(optimizer_type="AdamWScheduleFree"),
            "a schedule-free optimizer sets its own",
        ),
    ],
)
def test_notices(options, optimizer, expected):
    (notice,) = schedule_notices(options, optimizer)
    assert expected in notice


@pytest.mark.parametrize("name", NAMES)
def test_no_notices_for_plain_use(name):
    assert schedule_notices(schedule_options(name), ADAMW) == []
    assert schedule_notices(schedule_options(), ADAFACTOR) == []
