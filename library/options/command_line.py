"""``read_options``: from the words of a command line, and the config file they name, to checked option groups."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from library.errors import OptionError, OutputError, os_error_text, reader_may_leave
from library.files.atomic import write_text_atomically
from library.options.arguments import read_arguments, wants_help
from library.options.config_file import ConfigFileOptions, config_path, config_text, read_config
from library.options.declare import Option, groups_of, options_of, problems_of
from library.options.given import Given, known_options
from library.options.help_text import help_text

OptionSet = TypeVar("OptionSet")
CONFIG_GROUP = "config"  # ConfigFileOptions among the groups; no part of what read_options returns


def read_options(option_set: type[OptionSet], argv: Sequence[str] | None = None) -> OptionSet:
    """The options of ``argv`` (default: the process's own) over those of --config_file over the defaults, all checked.

    Raises OptionError with every problem found. --help and --output_config do their work and end the process with status 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    groups = _declared(option_set)
    if wants_help(arguments):
        with reader_may_leave():
            print(_help(option_set, groups))
        sys.exit(0)
    known = known_options(groups.values())
    line = read_arguments(arguments, known)
    if line.values.get("output_config"):
        _write_config(groups, line)
    file = _read_config_file(line, known)
    if os.environ.get("RANK", "0") == "0":
        for warning in (*line.warnings, *file.warnings):
            print(f"warning: {warning}", file=sys.stderr)
    options = _build(option_set, groups, {**file.values, **line.values})
    _raise_problems(options, line, file)
    return options


def _declared(option_set: type) -> dict[str, tuple[Option, ...]]:
    """Group name -> options, the config file's own first."""
    return {CONFIG_GROUP: options_of(ConfigFileOptions)} | {
        name: options_of(group) for name, group in groups_of(option_set).items()
    }


def _help(option_set: type, groups: Mapping[str, tuple[Option, ...]]) -> str:
    classes = {CONFIG_GROUP: ConfigFileOptions, **groups_of(option_set)}
    return help_text(Path(sys.argv[0]).name, {classes[name].__doc__ or name: options for name, options in groups.items()})


def _read_config_file(line: Given, known: Mapping[str, Option]) -> Given:
    named = line.values.get("config_file")
    if not named:
        return Given()
    try:
        return read_config(config_path(named, must_exist=True), known)
    except OptionError as error:
        raise OptionError(*line.problems, *error.problems) from error


def _build(option_set: type[OptionSet], groups: Mapping[str, tuple[Option, ...]], values: Mapping[str, Any]) -> OptionSet:
    classes = groups_of(option_set)
    return option_set(
        **{
            name: group(**{option.name: values[option.name] for option in groups[name] if option.name in values})
            for name, group in classes.items()
        }
    )


def _raise_problems(options: object, line: Given, file: Given) -> None:
    """What could not be read, then what the values that could be read say against each other."""
    doubtful = line.doubtful | file.doubtful
    places = {name: place for name, place in file.places.items() if name not in line.values}
    rules = (problem for problem in problems_of(options) if not doubtful.intersection(_flags_in(problem)))
    problems = [*line.problems, *file.problems, *(_with_place(problem, places) for problem in rules)]
    if problems:
        raise OptionError(*problems)


def _flags_in(problem: str) -> list[str]:
    return re.findall(r"--(\w+)", problem)


def _with_place(problem: str, places: Mapping[str, str]) -> str:
    """Names the file of the first option in ``problem`` whose value stands in a file."""
    place = next((places[name] for name in _flags_in(problem) if name in places), None)
    return f"{place}: {problem}" if place else problem


def _write_config(groups: Mapping[str, tuple[Option, ...]], line: Given) -> NoReturn:
    """--output_config: writes the file, says so, and ends the process."""
    own = ConfigFileOptions(config_file=line.values.get("config_file"), output_config=True)
    problems = [*line.problems, *own.problems()]
    if problems:
        raise OptionError(*problems)
    if os.environ.get("RANK", "0") == "0":  # of several processes one writes
        path = _new_config_path(own.config_file or "")
        _write_new(path, config_text(groups, line.values))
        secrets = [
            option.flag for options in groups.values() for option in options if option.secret and line.values.get(option.name)
        ]
        left_out = f"; left out: {', '.join(secrets)}" if secrets else ""
        print(f"wrote {path}{left_out}\nstart with it: --config_file={path}")
    sys.exit(0)


def _write_new(path: Path, text: str) -> None:
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise OutputError(f"--output_config: {path} cannot be written: {os_error_text(error)}") from error


def _new_config_path(text: str) -> Path:
    path = config_path(text, must_exist=False)
    if path.exists():
        raise OptionError(f"--output_config: {path} exists already and is not overwritten; name another --config_file")
    return path
