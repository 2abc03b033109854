"""Reading the command line: ``--flag value``, ``--flag=value``, ``--switch``, ``--switch=false``, ``--list a b c``."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence

from library.options.declare import Option
from library.options.given import Given, belongs_to_scripts, near_names, other_names, questioned
from library.options.left_out import LEFT_OUT

FLAG = re.compile(r"--[A-Za-z_][\w.-]*(=.*)?", re.DOTALL)  # what starts with -- and holds no blank before its =
ALMOST_FLAG = re.compile(r"[-\u2013\u2014]+[A-Za-z_][\w.-]*(=.*)?", re.DOTALL)  # one dash, or a dash from a text program
HELP = ("--help", "-h")
SHOWN = 6  # options that are named
SWITCH_TEXTS = {"true": True, "false": False}


def wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in HELP for argument in arguments)


def read_arguments(arguments: Sequence[str], known: Mapping[str, Option]) -> Given:
    """Typed values of the flags, each of which may be shortened to what it alone begins with. A flag given twice counts the last
    time; unknown ones and leftovers become problems."""
    given = Given()
    rest = deque(arguments)
    stray: list[str] = []
    while rest:
        argument = rest.popleft()
        if not FLAG.fullmatch(argument):
            if ALMOST_FLAG.fullmatch(argument):
                _refuse_unknown(given, argument, rest, known)
            else:
                stray.append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        option = known.get(name) or _abbreviated(given, name, known)
        if option is None:
            _refuse_unknown(given, argument, rest, known)
        elif option.is_switch:
            _take_switch(given, option, text if equals else "true", rest)
        else:
            _take_values(given, option, [text] if equals else [], rest)
    given.problems += [f"stray argument {argument!r}: it belongs to no flag; quote values that hold blanks" for argument in stray]
    return given


def _abbreviated(given: Given, name: str, known: Mapping[str, Option]) -> Option | None:
    """The only option whose name begins with ``name``: scripts that are made with argparse take such for the whole."""
    longer = longer_names(name, known)
    if len(longer) != 1:
        return None
    given.warnings.append(
        f"--{name} is taken for --{longer[0]}: write flags in full, as another one may begin like this some day"
    )
    return known[longer[0]]


def longer_names(name: str, known: Mapping[str, Option]) -> list[str]:
    """The options whose names begin with ``name``; none for a name that means something elsewhere."""
    if not name or name in LEFT_OUT or other_names(name, known) or belongs_to_scripts(name):
        return []
    return [longer for longer in known if longer.startswith(name)]


def _take_switch(given: Given, option: Option, text: str, rest: deque[str]) -> None:
    value = SWITCH_TEXTS.get(text.lower())
    if value is None:
        given.refuse(option, f"{option.flag} is {text!r}, but must be true or false: {option.flag} alone means true")
        return
    given.take(option, value)
    if rest and rest[0].lower() in SWITCH_TEXTS:
        word = rest.popleft()
        given.refuse(option, f"stray argument {word!r} after {option.flag}: write {option.flag}={word.lower()}")


def _take_values(given: Given, option: Option, texts: list[str], rest: deque[str]) -> None:
    """``texts`` holds what followed an equals sign. Appends the words that belong to the flag, and reads them."""
    while rest and (option.is_list or not texts) and not _ends_values(rest[0]):
        texts.append(rest.popleft())
    if option.is_list:
        given.take(option, [text for text in texts if text] if texts == [""] else texts)
    elif texts:
        given.take(option, texts[0])
    else:
        given.refuse(option, f"{option.flag} needs a value: {option.allowed}")


def _refuse_unknown(given: Given, argument: str, rest: deque[str], known: Mapping[str, Option]) -> None:
    """A flag nobody knows, together with the words that follow it: those were meant for it."""
    flag, equals, _ = argument.partition("=")
    while rest and not equals and not _ends_values(rest[0]):
        rest.popleft()
    name = flag.removeprefix("--")
    if flag.startswith("--") and len(longer := longer_names(name, known)) > 1:
        more = f" and {len(longer) - SHOWN} more" if len(longer) > SHOWN else ""
        given.problems.append(
            f"{flag} may be short for {', '.join(f'--{each}' for each in longer[:SHOWN])}{more}: write it in full"
        )
        given.doubtful.update(longer)
        return
    belongs = "" if other_names(name, known) else belongs_to_scripts(name)
    belongs = belongs or (f": {LEFT_OUT[name]}" if name in LEFT_OUT else "")
    near = [] if belongs else near_names(flag, known)
    hint = f"; drop {flag}" if belongs else questioned(near, dashes="--") or ": --help lists all flags"
    given.problems.append(f"unknown flag {flag}{belongs}{hint}")
    given.doubtful.update(near)


def _ends_values(argument: str) -> bool:
    return FLAG.fullmatch(argument) is not None or argument in HELP
