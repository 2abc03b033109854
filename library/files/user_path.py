"""Paths as users write them, in flags and in files: the home folder, and what no path can be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

SHOWN_CHARACTERS = 60  # of a path that is too long


class PathProblem(ValueError):
    """What is wrong with a path, in words that stand behind the name of its flag or key."""


def user_path(text: str) -> str:
    """The path with ``~`` or ``~name`` at its start as that home folder; else the text as it is.

    Raises PathProblem for a text that no path can be on this machine: the home of someone who is not there, a NUL character, a
    name that is too long, links that lead back to themselves. Whether anything is there is not asked.
    """
    if "\0" in text:
        raise PathProblem(f"{text!r} holds a NUL character, which no path can: take it out")
    path = _with_home(text)
    try:
        os.stat(path)  # noqa: PTH116  # a path may be an empty text
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = path if len(path) <= SHOWN_CHARACTERS else f"{path[:SHOWN_CHARACTERS]}..."
            raise PathProblem(f"{shown} ({len(path)} characters) is longer than a path can be here: shorten it") from error
        if error.errno == errno.ELOOP:
            raise PathProblem(f"{path} does not exist: {dead_link(Path(path))}") from error
    except ValueError as error:  # half a character, from JSON
        raise PathProblem(f"{text!r} is not a text that a path can be: {error}") from error
    return path


def dead_link(path: Path) -> str | None:
    """The words for the first link on the way to ``path`` that leads nowhere or back to itself; None where there is none."""
    for part in (*reversed(path.absolute().parents), path.absolute()):
        if os.path.islink(part) and not os.path.exists(part):  # noqa: PTH110, PTH114  # pathlib's raise for some
            return f"{part} is a link that leads nowhere (to {os.readlink(part)})"  # noqa: PTH115  # as it is written there
    return None


def _with_home(text: str) -> str:
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        user = text[1:].replace("\\", "/").partition("/")[0]
        whose = f"no user {user} is known here" if user else "the home folder is not known here"
        raise PathProblem(
            f"{text} begins with ~{user}, but {whose}: give the whole path, or ./{text} for a name that begins with ~"
        ) from error
