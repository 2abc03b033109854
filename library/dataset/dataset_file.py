"""Reading a dataset file (.toml or .json), and finding the files and folders it names."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from library.errors import DatasetError, did_you_mean
from library.files.json_text import parse_json
from library.files.text_file import line_of, quoted_line, read_utf8
from library.files.user_path import dead_link, user_path

FLAG = "--dataset_config"
BACKSLASH_HINT = "; in Windows paths write / or put the path in single quotes"
MIXED_LIST_HINT = (
    ": here a list in TOML holds values of one kind, only texts, only whole numbers (1) or only fractions (1.0); "
    "a .json dataset file can mix them"
)


def read_dataset_file(path: Path) -> dict:
    """The tables of the file. Raises DatasetError with file, line and column for a mistake in its syntax."""
    if path.suffix.lower() not in (".toml", ".json"):
        raise DatasetError(f"{FLAG} {path}: a dataset file ends in .toml or .json")
    if problem := missing_path_problem(path, folder=False):
        raise DatasetError(f"{FLAG} {problem}")
    text = read_utf8(path, error=DatasetError, flag=FLAG)
    document = _parse_json(text, path) if path.suffix.lower() == ".json" else _parse_toml(text, path)
    if not isinstance(document, dict):
        raise DatasetError(f'{path}: the file must hold one object with "datasets" in it')
    return document


def find_path(text: str, beside: Path | None) -> Path:
    """A path as the reference reads it, from the current folder; where nothing is there, from ``beside``, the dataset file's
    folder. None: the path comes from a flag, where home folders are already in place.

    Raises PathProblem for what cannot be a path.
    """
    path = Path(text if beside is None else user_path(text))
    if beside is not None and not path.is_absolute() and not _is_there(path) and _is_there(beside / path):
        return beside / path
    return path


def missing_path_problem(path: Path, *, folder: bool) -> str | None:
    """What is wrong with a path that should be a folder (or a file), or None."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: what cannot be a path
        return _missing(path, error)
    if folder and not stat.S_ISDIR(mode):
        return f"{path} is a file, not a folder"
    if not folder and not stat.S_ISREG(mode):
        return f"{path} is {'a folder, not a file' if stat.S_ISDIR(mode) else 'not a file'}"
    return None


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  # Path.exists raises for names that are too long, and for some links


def _missing(path: Path, error: OSError | ValueError) -> str:
    if link := dead_link(path):
        return f"{path} does not exist: {link}"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return f"{path} does not exist{_near_path(path)}"
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{path} cannot be read: {reason}"


def _near_path(path: Path) -> str:
    """Names the nearest existing sibling of the first part of the path that is not there."""
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        siblings = [sibling.name for sibling in missing.parent.iterdir()]
    except OSError:
        return ""
    near = did_you_mean(missing.name, siblings)
    return near or ("" if missing == path.absolute() else f" (there is no {missing})")


def _parse_json(text: str, path: Path) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a name twice; a number or a nesting that no one writes by hand
        raise DatasetError(f"{path}: {error}") from error


def _parse_toml(text: str, path: Path) -> object:
    import toml

    try:
        return toml.loads(text)
    except toml.TomlDecodeError as error:
        quoted = quoted_line(line_of(text, error.lineno))
        raise DatasetError(f"{path}, line {error.lineno}: {error.msg}{_syntax_hint(error.msg)}{quoted}") from error
    except Exception as error:  # the toml package lets other errors out on some broken files
        raise DatasetError(f"{path} is not a valid TOML file: {error or type(error).__name__}") from error


def _syntax_hint(reason: str) -> str:
    if "escape" in reason.lower():
        return BACKSLASH_HINT
    return MIXED_LIST_HINT if "homogeneous" in reason.lower() else ""
