"""Options are declared once: a field of a frozen dataclass, made with ``opt()``, is a flag, its help, a TOML key and a docs row.

A *group* is such a dataclass (one noun, e.g. ``NetworkOptions``); an *option set* is a dataclass whose fields are groups
(e.g. ``AnimaTrainOptions``). A group subclassed to restate a default changes nothing else.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from library.files.user_path import user_path
from library.options.kinds import BY_TYPE, PATH, SWITCH, TEXT, WHOLE, Kind

_METADATA = "option"
DATA_URL = "data:"  # what stands for a picture in place of its path


@dataclass(frozen=True, slots=True)
class _Declaration:
    help: str
    choices: tuple[Any, ...]
    kind: Kind | None
    path: bool
    secret: bool
    may_be_empty: bool


@dataclass(frozen=True, slots=True)
class Option:
    """One option as declared. ``name`` is the field, the flag without its dashes, and the TOML key."""

    name: str
    kind: Kind
    default: Any
    help: str
    choices: tuple[Any, ...]
    is_optional: bool  # None is a value: not given
    is_list: bool
    path: bool
    secret: bool
    may_be_empty: bool = False  # an empty text is a value, not "not given"

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def is_switch(self) -> bool:
        return self.kind is SWITCH

    @property
    def metavar(self) -> str:
        """What stands behind the flag: ``N``, ``NAME``, ``TEXT ...``; nothing for a switch."""
        one = "NAME" if self.choices else PATH.metavar if self.path else self.kind.metavar
        return f"{one} ..." if self.is_list else one

    @property
    def allowed(self) -> str:
        """What the option takes, in words."""
        if self.choices:
            in_order = sorted(self.choices) if self.kind is WHOLE else self.choices
            return f"one of {', '.join(map(str, in_order))}"
        return f"a list, each {self.kind.words}" if self.is_list else self.kind.words

    def read(self, value: object) -> Any:
        """The typed value of command-line text (a list of texts for a list option) or of a TOML value.

        An empty text or list means "not given" where that is possible. Raises ValueError for anything that does not fit, and
        PathProblem, which says why, for what cannot be a path.
        """
        if self.is_optional and value in ("", []) and not self.may_be_empty:
            return None
        if self.is_list:
            return self._read_list(value)
        read = self._read_one(value)
        if self.choices and read not in self.choices:
            raise ValueError
        return read

    def _read_list(self, value: object) -> list[Any]:
        if not isinstance(value, list):
            if self.kind.read is TEXT.read:
                raise ValueError  # "a=1 b=2" must not become one value
            value = [value]  # text_encoder_lr = 1e-5
        return [self._read_one(element) for element in value]

    def _read_one(self, value: object) -> Any:
        """``~`` is the home folder in paths: the shell replaces it in ``--vae ~/x`` but not in ``--vae=~/x``, nor in files."""
        read = self.kind.read(value)
        if self.path and isinstance(read, str) and not read.startswith(DATA_URL):
            return user_path(read)
        return read


def opt(  # noqa: PLR0913  # what can be said of an option
    default: Any,
    help: str,
    *,
    choices: Iterable[Any] | None = None,
    kind: Kind | None = None,
    path: bool = False,
    secret: bool = False,
    may_be_empty: bool = False,
) -> Any:
    """Declares an option as a dataclass field; the annotation gives its type.

    ``choices``: the allowed values, or a table with them as keys. ``kind``: another reader than the annotation's.
    ``path``: names a place on this machine; kept out of trackers. ``secret``: kept out of everything that is written.
    ``may_be_empty``: an empty text is a value of an option that may be not given.
    """
    declaration = _Declaration(help, tuple(choices or ()), kind, path, secret, may_be_empty)
    return field(default=default, metadata={_METADATA: declaration})


def options_of(group: type) -> tuple[Option, ...]:
    """The options of a group, in the order declared."""
    hints = typing.get_type_hints(group)
    return tuple(_option(f, hints[f.name]) for f in fields(group) if _METADATA in f.metadata)


def groups_of(option_set: type) -> dict[str, type]:
    """Field name -> group class of an option set, in order."""
    hints = typing.get_type_hints(option_set)
    return {f.name: hints[f.name] for f in fields(option_set) if is_dataclass(hints[f.name])}


def problems_of(options: Any) -> Iterator[str]:
    """All problems of an option set: each group's, then those between groups."""
    for name in groups_of(type(options)):
        yield from getattr(options, name).problems()
    yield from options.problems()


def warnings_of(options: Any) -> Iterator[str]:
    """What is allowed but probably not meant, of each group and between groups."""
    for name in groups_of(type(options)):
        group = getattr(options, name)
        if hasattr(group, "warnings"):
            yield from group.warnings()
    if hasattr(options, "warnings"):
        yield from options.warnings()


def _option(declared: Field, annotation: Any) -> Option:
    declaration: _Declaration = declared.metadata[_METADATA]
    types = set(typing.get_args(annotation)) if _is_union(annotation) else {annotation}
    is_optional = type(None) in types
    types.discard(type(None))
    lists = [t for t in types if typing.get_origin(t) is list]
    if lists:
        types = set(typing.get_args(lists[0]))
    kind = declaration.kind or BY_TYPE[frozenset(types)]
    assert declared.default is not MISSING, declared.name
    return Option(
        name=declared.name,
        kind=kind,
        default=declared.default,
        help=declaration.help,
        choices=declaration.choices,
        is_optional=is_optional,
        is_list=bool(lists),
        path=declaration.path or kind is PATH,
        secret=declaration.secret,
        may_be_empty=declaration.may_be_empty,
    )


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) is not list and bool(typing.get_args(annotation))
