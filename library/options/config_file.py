"""Option values in a TOML file: ``--config_file`` reads one, ``--output_config`` writes one.

Tables of the file only sort its keys; their names mean nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import OptionError, os_error_text
from library.files.text_file import line_of, quoted_line
from library.options.declare import Option, opt
from library.options.given import Given, belongs_to_scripts, near_names, questioned
from library.options.kinds import STEPS_OR_SHARE, TEXT
from library.options.left_out import LEFT_OUT, left_out_warning

NEVER_IN_FILE = ("config_file", "output_config", "dry_run")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFileOptions:
    """Config file: options kept in a TOML file. A flag on the command line wins over the file, the file over the default."""

    config_file: str | None = opt(
        None, "TOML file with option values, keys named as the flags (.toml may be left out)", path=True
    )
    output_config: bool = opt(
        False, "write the options of this command line to --config_file, which must not exist yet, and stop"
    )

    def problems(self) -> Iterator[str]:
        if self.output_config and not self.config_file:
            yield "--output_config needs --config_file: name the file to write"


def config_path(text: str, *, must_exist: bool) -> Path:
    """The file that ``--config_file`` means: as named, or with .toml at its end. Raises OptionError when it must exist."""
    named = Path(text)
    with_ending = named if named.suffix == ".toml" else named.with_name(f"{named.name}.toml")
    if with_ending.is_file() or not must_exist:
        return with_ending
    if named.is_file():
        return named
    folder = with_ending.parent
    there = [path.name for path in folder.glob("*.toml")] if folder.is_dir() else []
    near = near_names(with_ending.stem, [Path(name).stem for name in there])
    raise OptionError(
        f"--config_file {text}: there is no file {with_ending}{questioned([str(folder / f'{n}.toml') for n in near])}"
    )


def read_config(path: Path, known: Mapping[str, Option]) -> Given:
    """Typed values of all keys. Raises OptionError when the file cannot be read as TOML, with the line if no secret."""
    given = Given()
    left_out: list[str] = []
    for key, value in _load_toml(path, known).items():
        place, table, pairs = (f"{path}, [{key}]", key, value) if isinstance(value, dict) else (str(path), "", {key: value})
        for inner_key, inner_value in pairs.items():
            if inner_key in LEFT_OUT and inner_key not in known:
                left_out.append(inner_key)
            else:
                _take_key(given, inner_key, inner_value, known, place=place, table=table)
    if left_out:
        given.warnings.append(left_out_warning(str(path), left_out))
    return given


def config_text(groups: Mapping[str, tuple[Option, ...]], values: Mapping[str, Any]) -> str:
    """The file for ``values`` (option name -> value), one table per group; defaults and secrets are left out.

    Raises OptionError for a text that the TOML reader would not give back as it is.
    """
    tables = []
    for table, options in groups.items():
        lines = [_config_line(option, values[option.name]) for option in options if _belongs_in_file(option, values)]
        if lines:
            tables.append("\n".join([f"[{table}]", *lines, ""]))
    return "\n".join(tables)


def _belongs_in_file(option: Option, values: Mapping[str, Any]) -> bool:
    is_set = option.name in values and values[option.name] != option.default
    return is_set and not option.secret and option.name not in NEVER_IN_FILE


def _config_line(option: Option, value: Any) -> str:
    """``name = value`` in the first form that reads back as it was: the reader fails on some rare texts."""
    import toml

    for quoted in (_single_quoted, _double_quoted):
        line = f"{option.name} = {_toml_value(option, value, quoted)}"
        try:
            if option.read(toml.loads(line)[option.name]) == value:
                return line
        except (ValueError, TypeError, LookupError, AttributeError):  # the reader's own stumbling is no ValueError
            continue
    raise OptionError(
        f"{option.flag} {value!r} cannot be written to a TOML file: leave it out here and give it on the command line"
    )


def _take_key(given: Given, key: str, value: object, known: Mapping[str, Option], *, place: str, table: str) -> None:
    if isinstance(value, dict):
        given.problems.append(f"{place}: {key} is a table inside a table: write its keys directly under [{table}]")
    elif _is_table_array(value):
        given.problems.append(
            f"{place}: {key} is an array of tables, as dataset files have: give a dataset file with --dataset_config"
        )
    elif key in NEVER_IN_FILE[:2]:
        given.problems.append(f"{place}: {key} works on the command line only: take it out of the file")
    elif key not in known:
        belongs = belongs_to_scripts(key)
        near = [] if belongs else near_names(key, known)
        hint = "; take it out" if belongs else questioned(near) or ": keys are named as the flags, see --help"
        given.problems.append(f"{place}: unknown key {key}{belongs}{hint}")
        given.doubtful.update(near)
    elif not _says_not_set(known[key], value):
        given.take(known[key], value, place=place)


def _says_not_set(option: Option, value: object) -> bool:
    """Programs write an empty text for what is not set; only texts can be empty themselves, and what may be None reads it so."""
    is_plain_text = option.kind is TEXT and not option.choices
    return value == "" and not option.is_optional and not is_plain_text


def _is_table_array(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(element, dict) for element in value)


def _load_toml(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    import toml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OptionError(f"--config_file {path} cannot be read: {os_error_text(error)}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise OptionError(f"--config_file {path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    try:
        return toml.loads(text)
    except toml.TomlDecodeError as error:
        wrong = line_of(text, error.lineno)
        key = wrong.partition("=")[0].strip()
        quoted = quoted_line(wrong) if wrong.startswith("[") or (key in known and not known[key].secret) else ""
        raise OptionError(_syntax_problem(path, wrong, error.lineno, error.msg) + quoted) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # the parser stumbles over some broken files
        raise OptionError(f"--config_file {path} is not valid TOML: {error}") from error


def _syntax_problem(path: Path, line: str, line_number: int, reason: str) -> str:
    value = line.partition("=")[2].strip()
    hint = ""
    if "\\" in line:
        hint = "; write paths with / or in 'single quotes'"
    elif "homogeneous" in reason:
        hint = "; write the numbers of a list alike, such as [1e-4, 0.0]"
    elif value and not re.match(r"[\"'\[{\d+.-]|true|false|inf|nan", value):
        hint = "; texts stand in quotes, switches are true or false"
    key = line.partition("=")[0].strip()  # the value may be secret
    return f"--config_file {path}, line {line_number}{f' ({key})' if key else ''}: {_plain_reason(reason)}{hint}"


def _plain_reason(reason: str) -> str:
    """The parser's words without values of the file: one may be a key or token."""
    if reason.startswith("What?"):
        return f"the table [{reason.split()[1]}] stands here twice"
    if reason.startswith(("invalid literal", "could not convert")):
        return "this is no TOML value"
    return reason.rstrip(".")


def _toml_value(option: Option, value: Any, quoted: Callable[[str], str]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(option, element, quoted) for element in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if option.kind is STEPS_OR_SHARE and isinstance(value, float) and value >= 1:
        return f'"{value * 100!r}%"'  # 1.0 is all of the run; without the sign it would be refused
    if isinstance(value, (int, float)):
        return repr(value)
    return quoted(str(value))


def _single_quoted(text: str) -> str:
    """Nothing is escaped inside, so that Windows paths stay readable; plain texts have the usual quotes."""
    needs_care = ("\\" in text or '"' in text) and "'" not in text and text.isprintable()
    return f"'{text}'" if needs_care else _double_quoted(text)


def _double_quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
