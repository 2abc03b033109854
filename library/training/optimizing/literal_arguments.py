"""``key=value`` arguments whose values are Python literals (--optimizer_args, --lr_scheduler_args). Torch-free."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from library.errors import OptionError, did_you_mean
from library.options.rules import quoted_together


def parse_literals(arguments: Sequence[str] | None, *, flag: str) -> dict[str, Any]:
    """``["betas=0.9,0.99", "amsgrad=True"]`` -> values. Raises OptionError with a problem for each bad one."""
    values, problems = {}, []
    for argument in arguments or ():
        key, equals, text = argument.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            problems.append(f"{flag} {argument!r} is not key=value: write for example weight_decay=0.01")
            continue
        try:
            values[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if problem := quoted_together(argument, flag=flag):
                problems.append(problem)
                continue
            problems.append(f"{flag} {argument!r}: {text.strip()!r} is not a Python value{_value_hint(key, text.strip())}")
    if problems:
        raise OptionError(*problems)
    return values


def _value_hint(key: str, text: str) -> str:
    named = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(text.lower())
    if named:
        return f"; write {key}={named}"
    return f"; use a number, True, False, None, a list such as 0.9,0.99, or a quoted string: {key}=\"'{text}'\""


def argument_problems(call: Callable[..., Any], values: dict[str, Any], *, flag: str, ours: Iterable[str]) -> Iterator[str]:
    """What is wrong with keyword arguments for ``call``: unknown names, or kinds other than the default value's.

    ``ours``: names that the trainer passes itself. A callable that takes any keyword is left to judge by itself.
    """
    parameters = inspect.signature(call).parameters
    reserved = {"self", *ours}
    named = {
        p.name: p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in reserved
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    who = getattr(call, "__name__", str(call))
    for key, value in values.items():
        if key in reserved:
            yield f"{flag} {key}={value!r}: the trainer sets {key} itself; leave it out"
        elif key in named:
            yield from _kind_problem(named[key], value, flag)
        elif not takes_any:
            hint = did_you_mean(key, named)
            yield f"{flag} {key}={value!r}: {who} has no argument {key}{hint}; it takes {', '.join(sorted(named)) or 'none'}"


def _kind_problem(parameter: inspect.Parameter, value: Any, flag: str) -> Iterator[str]:
    default = parameter.default
    for kinds, accepted, words in (
        (bool, (bool, type(None)), "True or False"),
        ((int, float), (int, float, type(None)), "a number"),
        ((tuple, list), (tuple, list, type(None)), "several values, such as 0.9,0.99"),
        (str, (str, type(None)), "a quoted string"),
    ):
        if isinstance(default, kinds):  # type: ignore[arg-type]
            if not isinstance(value, accepted):  # type: ignore[arg-type]
                yield f"{flag} {parameter.name}={value!r} must be {words} (default {default!r})"
            return


def class_place(name: str) -> tuple[str, str]:
    """``package.module.Class`` -> (module, class)."""
    module, _, class_name = name.rpartition(".")
    return module, class_name
