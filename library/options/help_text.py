"""The text of --help: every group with its flags, what each does, and its default."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping

from library.options.declare import Option

FLAG_COLUMNS = 34
WIDTH_RANGE = (80, 120)


def help_text(script: str, groups: Mapping[str, tuple[Option, ...]], *, columns: int | None = None) -> str:
    """``groups``: title -> options. ``columns``: width of the text; None takes the terminal's."""
    width = columns or min(max(shutil.get_terminal_size().columns, WIDTH_RANGE[0]), WIDTH_RANGE[1])
    parts = [f"usage: {script} --flag=value --switch --list value value ...\n\n  --help, -h shows this text"]
    parts += [f"{title}\n{_lines(options, width)}" for title, options in groups.items()]
    parts.append(
        "--switch=false turns a switch of the config file off; an empty value (--vae=) takes a value of the config file back."
    )
    return "\n\n".join(parts)


def default_text(option: Option) -> str:
    """The default in words."""
    if option.default is None:
        return "not set"
    if option.is_switch:
        return "on" if option.default else "off"
    return str(option.default) if option.default != "" else "empty"


def _lines(options: Iterable[Option], width: int) -> str:
    return "\n".join(line for option in options for line in _entry(option, width))


def _entry(option: Option, width: int) -> list[str]:
    flag = f"  {option.flag} {option.metavar}".rstrip()
    text = textwrap.wrap(_description(option), width - FLAG_COLUMNS)
    if len(flag) + 2 > FLAG_COLUMNS:
        text.insert(0, "")
    padded = [flag, *[""] * (len(text) - 1)]
    return [f"{left:<{FLAG_COLUMNS}}{right}".rstrip() for left, right in zip(padded, text, strict=True)]


def _description(option: Option) -> str:
    choices = f": {', '.join(map(str, option.choices))}" if option.choices else ""
    has_default = option.default is not None and not option.is_switch and option.default != ""
    return f"{option.help}{choices}{f' [default: {default_text(option)}]' if has_default else ''}"
