"""The options as tables: for the documentation, for metadata, and for trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.options.declare import groups_of, options_of
from library.options.help_text import default_text


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a reference of flags; all fields are text."""

    group: str  # what the group is about: "Run: length, seed, precision and memory."
    flag: str
    type: str
    default: str
    choices: str
    help: str


def option_rows(option_set: type) -> list[Row]:
    """A row per option of an option set, in the order of the groups."""
    return [
        Row(
            group=group.__doc__ or "",
            flag=option.flag,
            type="switch" if option.is_switch else option.metavar,
            default=default_text(option),
            choices=", ".join(map(str, option.choices)),
            help=option.help,
        )
        for group in groups_of(option_set).values()
        for option in options_of(group)
    ]


def markdown(option_set: type) -> str:
    """The reference of an option set as Markdown: a heading and a table for each group."""
    lines: list[str] = []
    group = None
    for row in option_rows(option_set):
        if row.group != group:
            group = row.group
            title, _, about = group.partition(": ")
            lines += ["", f"### {title}", "", about, "", "| Flag | Value | Default | Meaning |", "|---|---|---|---|"]
        value = row.choices or row.type
        cells = [f"`{row.flag}`", value, row.default, row.help]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).strip() + "\n"


def as_dict(options: object) -> dict[str, Any]:
    """Option name -> value, over all groups."""
    return {
        option.name: getattr(getattr(options, name), option.name)
        for name, group in groups_of(type(options)).items()
        for option in options_of(group)
    }


def redacted(options: object) -> dict[str, Any]:
    """As ``as_dict``, without keys and without names of places on this machine; lists become one text."""
    hidden = {
        option.name for group in groups_of(type(options)).values() for option in options_of(group) if option.path or option.secret
    }
    values = {name: value for name, value in as_dict(options).items() if name not in hidden}
    return {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
