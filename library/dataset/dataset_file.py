"""Reading a dataset file (.toml or .json), and finding the files and folders it names."""

from __future__ import annotations

import json
from pathlib import Path

from library.errors import DatasetError, did_you_mean
from library.files.text_file import read_utf8

FLAG = "--dataset_config"
BACKSLASH_HINT = "; in Windows paths write / or put the path in single quotes"


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
    """A path as the reference reads it, from the current folder; where nothing is there, from the dataset file's folder."""
    path = Path(text).expanduser()
    if beside is not None and not path.is_absolute() and not path.exists() and (beside / path).exists():
        return beside / path
    return path


def missing_path_problem(path: Path, *, folder: bool) -> str | None:
    """What is wrong with a path that should be a folder (or a file), or None."""
    if path.is_dir() if folder else path.is_file():
        return None
    if path.exists():
        return f"{path} is {'a file, not a folder' if folder else 'a folder, not a file'}"
    return f"{path} does not exist{_near_path(path)}"


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
        return json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a name twice; a number or a nesting that no one writes by hand
        raise DatasetError(f"{path}: {error}") from error


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON allows a name twice in one object, and the first value would be lost without a word; TOML refuses it itself."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands twice in one object: take one of the two out")
    return table


def _parse_toml(text: str, path: Path) -> object:
    import toml

    try:
        return toml.loads(text)
    except toml.TomlDecodeError as error:
        hint = BACKSLASH_HINT if "escape" in error.msg.lower() else ""
        raise DatasetError(f"{path}, line {error.lineno}: {error.msg}{hint}") from error
    except Exception as error:  # the toml package lets other errors out on some broken files
        raise DatasetError(f"{path} is not a valid TOML file: {error or type(error).__name__}") from error
