"""Optimizers: made from the options, and their state kept so that a resumed run goes on bit by bit.

Packages are imported here, when an optimizer is made; names and flags were checked before (optimizer_names.py).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from library.errors import CheckpointError, OptionError, did_you_mean
from library.training.optimizing.literal_arguments import argument_problems, parse_literals
from library.training.optimizing.optimizer_names import (
    ARGS_FLAG,
    OptimizerSource,
    missing_package,
    one_rate_problems,
    optimizer_arguments,
    optimizer_kind,
    optimizer_source,
)

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions


class CreatedOptimizer(NamedTuple):
    optimizer: torch.optim.Optimizer
    description: str  # "module.Class(k=v,k=v)", for the metadata of the LoRA file


def create_optimizer(param_groups: Sequence[Mapping[str, Any]], options: OptimizerOptions) -> CreatedOptimizer:
    """Makes the optimizer that the options name, in its training mode.

    ``param_groups``: dictionaries with ``params`` and, where it differs from --learning_rate, ``lr``. Adafactor with
    relative steps gets no learning rates. Raises OptionError for a missing package or arguments the class does not take.
    """
    source = optimizer_source(options)
    optimizer_class = import_class(source)
    arguments = optimizer_arguments(options)
    given = parse_literals(options.optimizer_args, flag=ARGS_FLAG)
    problems = list(argument_problems(optimizer_class, given, flag=ARGS_FLAG, ours=("params", "lr", *source.fixed)))
    if problems:
        raise OptionError(*problems)
    brings_own_rate = optimizer_kind(options) == "adafactor_relative"
    groups, lr = _with_learning_rates(param_groups, None if brings_own_rate else options.learning_rate)
    _check_rates(source, groups, lr)
    try:
        optimizer = optimizer_class(groups, lr=lr, **arguments)
    except Exception as error:  # classes of other packages raise what they like
        raise OptionError(f"{source.path} cannot be made with {_shown(arguments) or 'its defaults'}: {error}") from error
    _switch(optimizer, "train")
    path = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    return CreatedOptimizer(optimizer, f"{path}({_shown(given)})" if given else path)


def import_class(source: OptimizerSource) -> Callable[..., Any]:
    """Raises OptionError when the package is missing, cannot be imported, or has no such class."""
    try:
        with _quiet("bitsandbytes"):
            module = importlib.import_module(source.module)
    except ModuleNotFoundError as error:
        if error.name == source.package:
            raise OptionError(missing_package(source)) from error
        raise OptionError(f"--optimizer_type {source.path}: importing {source.module} failed: {error}") from error
    except Exception as error:  # a package that does not fit this machine raises anything
        raise OptionError(f"--optimizer_type {source.path}: importing {source.module} failed: {error}") from error
    found = getattr(module, source.class_name, None)
    if not isinstance(found, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        hint = did_you_mean(source.class_name, classes)
        raise OptionError(f"--optimizer_type {source.path}: {source.module} has no class {source.class_name}{hint}")
    return found


def _with_learning_rates(
    param_groups: Sequence[Mapping[str, Any]], lr: float | None
) -> tuple[list[dict[str, Any]], float | None]:
    groups = [dict(group) for group in param_groups]
    for group in groups:
        if lr is None or group.get("lr") is None:
            group.pop("lr", None)
    return groups, lr


def _check_rates(source: OptimizerSource, groups: list[dict[str, Any]], lr: float | None) -> None:
    rates: set[Any] = {group.get("lr", lr) for group in groups} - {0, None}
    if problems := list(one_rate_problems(source, rates)):
        raise OptionError(*problems)


def _shown(arguments: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in arguments.items())


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a package's warnings about features that are not used here off the console while it is imported."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The weights to save, sample and validate with. Schedule-free optimizers train at another point than they end at.

    Switching there and back rounds, so the training weights are put back exactly: what was done in between leaves no trace.
    A resumable state is saved outside of this, with the training weights.
    """
    if not _switches(optimizer):
        yield
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    training = [param.detach().clone() for param in params]
    _switch(optimizer, "eval")
    try:
        yield
    finally:
        _switch(optimizer, "train")
        with torch.no_grad():
            for param, values in zip(params, training, strict=True):
                param.copy_(values)


def _switches(optimizer: torch.optim.Optimizer) -> bool:
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    if callable(getattr(optimizer, mode, None)):
        getattr(optimizer, mode)()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that the next step depends on besides the weights: for ``torch.save``, and ``torch.load(weights_only=True)``.

    Taken from the optimizer's fields rather than its ``state_dict``, which rounds states to the weights' dtype on the way back.
    The tensors are the optimizer's own: save them before the next step, or copy them.
    """
    params = _params(optimizer)
    return {
        "class": _class_path(optimizer),
        "shapes": [[list(param.shape) for param in group["params"]] for group in optimizer.param_groups],
        "state": {index: dict(optimizer.state[param]) for index, param in enumerate(params) if optimizer.state.get(param)},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Puts a state of :func:`optimizer_state` into an optimizer over the same parameters; every value keeps its dtype.

    Paged bitsandbytes states come back as ordinary memory. Raises CheckpointError when the state is of another optimizer or
    other parameters.
    """
    _check_fits(optimizer, saved)
    params = _params(optimizer)
    copies: dict[int, Tensor] = {}  # tensors that several parameters share (bitsandbytes' tables) stay shared
    optimizer.state.clear()
    for index, values in saved["state"].items():
        group = _group_of(optimizer, index)
        device = params[index].device
        restored = {key: _placed(value, _device_of(key, group, device), copies) for key, value in values.items()}
        optimizer.state[params[index]] = restored
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        group.update({key: _placed(value, device, copies) for key, value in values.items()})


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _class_path(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}"


def _check_fits(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    missing = {"class", "shapes", "state", "groups"} - saved.keys()
    if missing:
        raise CheckpointError(
            f"the optimizer state has no {', '.join(sorted(missing))}: it was saved by another trainer or version"
        )
    if saved["class"] != _class_path(optimizer):
        raise CheckpointError(
            f"the state was saved with the optimizer {saved['class']}, but this run has {_class_path(optimizer)}: "
            "give the same --optimizer_type, or start a new run with --network_weights"
        )
    shapes = [[list(param.shape) for param in group["params"]] for group in optimizer.param_groups]
    if shapes != saved["shapes"]:
        raise CheckpointError(
            f"the optimizer state is for {_count(saved['shapes'])} that differ from this run's {_count(shapes)}: "
            "give the same network options, or start a new run with --network_weights"
        )


def _count(shapes: list[list[list[int]]]) -> str:
    return f"{sum(map(len, shapes))} weights in {len(shapes)} groups"


def _group_of(optimizer: torch.optim.Optimizer, index: int) -> Mapping[str, Any]:
    for group in optimizer.param_groups:
        if index < len(group["params"]):
            return group
        index -= len(group["params"])
    raise CheckpointError(f"the optimizer state has values for weight {index}, which does not exist")


def _device_of(key: str, group: Mapping[str, Any], device: torch.device) -> torch.device:
    """torch keeps step counters on the host, unless its kernels read them on the device."""
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if on_host else device


def _placed(value: Any, device: torch.device, copies: dict[int, Tensor]) -> Any:
    """Copies tensors to the device, inside lists and dictionaries too; leaves all else."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to(device, copy=True)
        return copies[id(value)]
    if isinstance(value, Mapping):
        return {key: _placed(item, device, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(item, device, copies) for item in value)
    return value
