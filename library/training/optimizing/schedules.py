"""Learning-rate schedules. Every count is in optimizer steps of the whole run, however many processes it has."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR

from library.errors import OptionError, did_you_mean
from library.training.optimizing.literal_arguments import argument_problems, parse_literals
from library.training.optimizing.optimizer_names import optimizer_kind
from library.training.optimizing.schedule_names import (
    ARGS_FLAG,
    NAMED_SCHEDULES,
    piecewise_rules,
    schedule_class_place,
    schedule_name,
    step_count,
)

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions
    from library.options.schedule import ScheduleOptions


class Schedule(Protocol):
    """What the training loop needs of a schedule: torch's have it."""

    def step(self) -> None: ...
    def get_last_lr(self) -> list[float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def create_schedule(stepped: torch.optim.Optimizer, options: ScheduleOptions, *, total_steps: int,
                    optimizer: OptimizerOptions) -> Schedule:  # fmt: skip
    """The schedule that the options name, for ``stepped``, the optimizer that ``optimizer`` describes.

    An optimizer that sets its own rates keeps them. Raises OptionError.
    """
    kind = optimizer_kind(optimizer)
    if kind == "schedule_free":
        return OwnRates(stepped)
    if kind == "adafactor_relative":
        return AdafactorRates(stepped, initial=optimizer.learning_rate)
    given = parse_literals(options.lr_scheduler_args, flag=ARGS_FLAG)
    if options.lr_scheduler_type:
        return _make(_imported_class(options), stepped, {}, given)
    name = schedule_name(options)
    if name == "adafactor":
        raise OptionError("--lr_scheduler adafactor goes with --optimizer_type Adafactor and relative_step=True")
    if name in OUR_SCHEDULES:
        return _make(OUR_SCHEDULES[name], stepped, {}, given)
    return _transformers_schedule(name, stepped, options, total_steps, given)


class OwnRates:
    """Stands where a schedule would, for optimizers that set their own learning rates: only tells what they are."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def step(self) -> None:
        """Nothing to do: the optimizer counts its steps."""

    def get_last_lr(self) -> list[float]:
        """One rate for each parameter group."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: all is in the optimizer's state."""


class AdafactorRates(OwnRates):
    """Writes the rates that Adafactor's relative steps come to into its groups, for logs: Adafactor does not read them."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, initial: float):
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = initial  # shown until the first step

    def step(self) -> None:
        """The rate of each group's first weight. Stays a tensor: it is read only when it is shown."""
        for group in self._optimizer.param_groups:
            state = self._optimizer.state.get(group["params"][0])
            if state:
                group["lr"] = self._optimizer._get_lr(group, state)  # type: ignore[attr-defined]


def constant(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The learning rates as given."""
    return LambdaLR(optimizer, lambda step: 1.0)


def piecewise_constant(optimizer: torch.optim.Optimizer, step_rules: str) -> LambdaLR:
    """``"1:10,0.1:20,0.01"``: the learning rate times 1 before step 10, times 0.1 before step 20, then times 0.01."""
    rules, last = piecewise_rules(step_rules)
    return LambdaLR(optimizer, lambda step: next((factor for end, factor in rules if step < end), last))


OUR_SCHEDULES: dict[str, Callable[..., LambdaLR]] = {"constant": constant, "piecewise_constant": piecewise_constant}


def _transformers_schedule(name: str, optimizer: torch.optim.Optimizer, options: ScheduleOptions, total_steps: int,
                           given: dict[str, Any]) -> Schedule:  # fmt: skip
    function_name = NAMED_SCHEDULES[name].function
    assert function_name is not None
    function = getattr(importlib.import_module("transformers.optimization"), function_name, None)
    if function is None:
        raise OptionError(f"--lr_scheduler {name} needs a newer transformers: pip install -U transformers")
    return _make(function, optimizer, _step_arguments(name, options, total_steps), given)


def _step_arguments(name: str, options: ScheduleOptions, total_steps: int) -> dict[str, Any]:
    """What the functions of transformers take, from our options."""
    arguments: dict[str, Any] = {"num_warmup_steps": step_count(options.lr_warmup_steps, total_steps)}
    uses = NAMED_SCHEDULES[name].uses
    if name == "warmup_stable_decay":
        arguments |= _stable_and_decay(options, total_steps, arguments["num_warmup_steps"])
    elif name not in ("constant_with_warmup", "inverse_sqrt"):
        arguments["num_training_steps"] = total_steps
    if name == "cosine_with_restarts":
        arguments["num_cycles"] = options.lr_scheduler_num_cycles
    elif "lr_scheduler_num_cycles" in uses:
        arguments["num_cycles"] = options.lr_scheduler_num_cycles / 2  # these count whole waves: half a one falls once
    if name == "polynomial":
        arguments["power"] = options.lr_scheduler_power
    if name == "inverse_sqrt":
        arguments["timescale"] = options.lr_scheduler_timescale
    if "lr_scheduler_min_lr_ratio" in uses and options.lr_scheduler_min_lr_ratio is not None:
        key = "min_lr_ratio" if name == "warmup_stable_decay" else "min_lr_rate"
        arguments[key] = options.lr_scheduler_min_lr_ratio
    return arguments


def _stable_and_decay(options: ScheduleOptions, total_steps: int, warmup_steps: int) -> dict[str, int]:
    decay_steps = step_count(options.lr_decay_steps, total_steps)
    stable_steps = total_steps - warmup_steps - decay_steps
    if stable_steps < 0:
        raise OptionError(
            f"--lr_warmup_steps ({warmup_steps} steps) and --lr_decay_steps ({decay_steps} steps) are longer than the run of "
            f"{total_steps} steps: shorten one of them"
        )
    return {"num_stable_steps": stable_steps, "num_decay_steps": decay_steps}


def _imported_class(options: ScheduleOptions) -> Callable[..., Any]:
    module_name, class_name = schedule_class_place(options)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise OptionError(f"--lr_scheduler_type {options.lr_scheduler_type}: importing {module_name} failed: {error}") from error
    found = getattr(module, class_name, None)
    if not callable(found):
        raise OptionError(f"--lr_scheduler_type: {module_name} has no class {class_name}{did_you_mean(class_name, vars(module))}")
    return found


def _make(
    make: Callable[..., Any], optimizer: torch.optim.Optimizer, arguments: dict[str, Any], given: dict[str, Any]
) -> Schedule:
    """Calls ``make(optimizer, ...)`` with our arguments under the user's."""
    problems = list(argument_problems(make, given, flag=ARGS_FLAG, ours=("optimizer", "last_epoch")))
    if problems:
        raise OptionError(*problems)
    try:
        return make(optimizer, **{**arguments, **given})
    except Exception as error:  # classes of other packages raise what they like
        raise OptionError(f"the learning-rate schedule {getattr(make, '__name__', make)} cannot be made: {error}") from error
