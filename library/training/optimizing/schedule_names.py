"""Which learning-rate schedule the options mean, and whether it can be had. Torch-free."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import OptionError, did_you_mean
from library.training.optimizing.literal_arguments import class_place, parse_literals
from library.training.optimizing.optimizer_names import optimizer_kind

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions
    from library.options.schedule import ScheduleOptions

ARGS_FLAG = "--lr_scheduler_args"
TORCH_MODULE = "torch.optim.lr_scheduler"


@dataclass(frozen=True, slots=True)
class NamedSchedule:
    """``function`` of transformers.optimization, None = made here; ``uses``: the option fields that it reads."""

    function: str | None = None
    uses: tuple[str, ...] = ("lr_warmup_steps",)


_WARMUP, _CYCLES, _MIN_LR = "lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"

NAMED_SCHEDULES: dict[str, NamedSchedule] = {
    "constant": NamedSchedule(uses=()),
    "constant_with_warmup": NamedSchedule("get_constant_schedule_with_warmup"),
    "linear": NamedSchedule("get_linear_schedule_with_warmup"),
    "cosine": NamedSchedule("get_cosine_schedule_with_warmup"),
    "cosine_with_restarts": NamedSchedule("get_cosine_with_hard_restarts_schedule_with_warmup", (_WARMUP, _CYCLES)),
    "polynomial": NamedSchedule("get_polynomial_decay_schedule_with_warmup", (_WARMUP, "lr_scheduler_power")),
    "inverse_sqrt": NamedSchedule("get_inverse_sqrt_schedule", (_WARMUP, "lr_scheduler_timescale")),
    "cosine_with_min_lr": NamedSchedule("get_cosine_with_min_lr_schedule_with_warmup", (_WARMUP, _CYCLES, _MIN_LR)),
    "cosine_warmup_with_min_lr": NamedSchedule(
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate", (_WARMUP, _CYCLES, _MIN_LR)
    ),
    "warmup_stable_decay": NamedSchedule("get_wsd_schedule", (_WARMUP, "lr_decay_steps", _CYCLES, _MIN_LR)),
    "piecewise_constant": NamedSchedule(uses=()),
    "adafactor": NamedSchedule(uses=()),
}
NEEDS_A_LOSS = ("reduce_lr_on_plateau", "greedy", "ReduceLROnPlateau", "GreedyLR")
NEEDS_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
# Option fields that only some schedules read -> the value that says "not given".
OPTIONAL_FIELDS = {
    "lr_decay_steps": 0,
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1,
    "lr_scheduler_timescale": None,
    "lr_scheduler_min_lr_ratio": None,
}


def schedule_problems(schedule: ScheduleOptions, optimizer: OptimizerOptions) -> list[str]:
    """What is wrong with the schedule, as far as it shows without importing torch."""
    problems: list[str] = []
    try:
        given = parse_literals(schedule.lr_scheduler_args, flag=ARGS_FLAG)
    except OptionError as error:
        problems += error.problems
        given = None
    if schedule.lr_scheduler_type:
        problems += _class_problems(schedule)
    else:
        problems += _name_problems(schedule, optimizer)
        if given is not None:
            problems += _argument_problems(schedule, given)
    return problems


def schedule_notices(schedule: ScheduleOptions, optimizer: OptimizerOptions) -> list[str]:
    """Which given options a valid choice does not use; lines for the plan."""
    kind = optimizer_kind(optimizer)
    if kind != "plain":
        return _forced_notices(
            schedule, "a schedule-free optimizer" if kind == "schedule_free" else "Adafactor with relative_step"
        )
    if schedule.lr_scheduler_type:
        ignored = [] if schedule.lr_scheduler == "constant" else ["--lr_scheduler"]
        ignored += _unused_flags(schedule, ())
        return [f"{', '.join(ignored)}: not used, --lr_scheduler_type {schedule.lr_scheduler_type} decides"] if ignored else []
    name = schedule_name(schedule)
    ignored = _unused_flags(schedule, NAMED_SCHEDULES[name].uses)
    return [f"{', '.join(ignored)}: not used by --lr_scheduler {name}"] if ignored else []


def schedule_name(schedule: ScheduleOptions) -> str:
    """The named schedule. Raises OptionError for one that is unknown or cannot be used."""
    name = schedule.lr_scheduler.lower()
    if name in NEEDS_A_LOSS:
        raise OptionError(
            f"--lr_scheduler {schedule.lr_scheduler} lowers the rate when a validation loss stops falling, which training steps "
            "do not have: use cosine, or constant_with_warmup"
        )
    if name not in NAMED_SCHEDULES:
        hint = did_you_mean(name, NAMED_SCHEDULES)
        raise OptionError(
            f"--lr_scheduler {schedule.lr_scheduler} is not known{hint}: use one of {', '.join(NAMED_SCHEDULES)}, "
            "or a class with --lr_scheduler_type"
        )
    return name


def schedule_class_place(schedule: ScheduleOptions) -> tuple[str, str]:
    """(module, class) of --lr_scheduler_type; a bare name is a class of torch."""
    name = schedule.lr_scheduler_type
    return class_place(name) if "." in name else (TORCH_MODULE, name)


def step_count(value: int | float, total_steps: int) -> int:
    """Warm-up or decay steps: an int is steps, a float is a share of the run."""
    return int(value * total_steps) if isinstance(value, float) else value


def torch_schedule_names() -> tuple[str, ...]:
    """Schedule classes of the installed torch, read off its source; empty when that is not possible."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            tree = ast.parse((Path(folder) / "optim" / "lr_scheduler.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            continue
        return tuple(node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
    return ()


def _name_problems(schedule: ScheduleOptions, optimizer: OptimizerOptions) -> Iterator[str]:
    try:
        name = schedule_name(schedule)
    except OptionError as error:
        yield from error.problems
        return
    if name == "piecewise_constant" and schedule.lr_warmup_steps:
        yield f"--lr_warmup_steps is {schedule.lr_warmup_steps}, but {name} has no warm-up: begin step_rules with it"
    if name == "adafactor" and _kind(optimizer) not in ("adafactor_relative", None):
        yield "--lr_scheduler adafactor goes with --optimizer_type Adafactor and relative_step=True: choose another one"


def _kind(optimizer: OptimizerOptions) -> str | None:
    try:
        return optimizer_kind(optimizer)
    except OptionError:
        return None  # reported by optimizer_problems


def _argument_problems(schedule: ScheduleOptions, given: dict) -> Iterator[str]:
    name = schedule.lr_scheduler.lower()
    if name == "piecewise_constant":
        try:
            piecewise_rules(given.get("step_rules"))
        except OptionError as error:
            yield from error.problems
    if name in NEEDS_MIN_LR and schedule.lr_scheduler_min_lr_ratio is None and not given.keys() & {"min_lr", "min_lr_rate"}:
        yield f"--lr_scheduler {name} needs the rate it ends at: give --lr_scheduler_min_lr_ratio, for example 0.1"


def piecewise_rules(text: object) -> tuple[list[tuple[int, float]], float]:
    """``"1:10,0.1:20,0.01"`` -> factor 1 before step 10, 0.1 before step 20, then 0.01: ([(10, 1.0), (20, 0.1)], 0.01)."""
    try:
        if not isinstance(text, str):
            raise ValueError
        *rules, last = text.split(",")
        parsed = [(int(steps), float(factor)) for factor, steps in (rule.split(":") for rule in rules)]
        return sorted(parsed), float(last)
    except ValueError:
        given = "is missing" if text is None else f"is {text!r}"
        raise OptionError(
            f"--lr_scheduler piecewise_constant reads step_rules, which {given}: give for example "
            "--lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\" (rate x1 before step 10, x0.1 before step 20, then x0.01)"
        ) from None


def _class_problems(schedule: ScheduleOptions) -> Iterator[str]:
    module, class_name = schedule_class_place(schedule)
    package = module.partition(".")[0]
    if class_name in NEEDS_A_LOSS:
        yield f"--lr_scheduler_type {class_name} needs a validation loss at every step: choose another one"
    elif module == TORCH_MODULE:
        names = torch_schedule_names()
        if names and class_name not in names:
            yield f"--lr_scheduler_type {class_name} is not a class of {TORCH_MODULE}{did_you_mean(class_name, names)}"
    elif not package.isidentifier() or importlib.util.find_spec(package) is None:
        yield f"--lr_scheduler_type {schedule.lr_scheduler_type}: the package {package!r} is not installed, check its spelling"


def _forced_notices(schedule: ScheduleOptions, owner: str) -> list[str]:
    ignored = [] if schedule.lr_scheduler in ("constant", "adafactor") else ["--lr_scheduler"]
    ignored += [f"--{name}" for name in ("lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps") if getattr(schedule, name)]
    ignored += _unused_flags(schedule, ())
    return [f"{', '.join(ignored)}: not used, {owner} sets its own learning rates"] if ignored else []


def _unused_flags(schedule: ScheduleOptions, used: tuple[str, ...]) -> list[str]:
    return [f"--{name}" for name, unset in OPTIONAL_FIELDS.items() if name not in used and getattr(schedule, name) != unset]
