"""The ``key=value`` pairs of --network_args: each is declared once, parsed, and checked together with the others.

A pattern is a Python regular expression that must match a module's whole dotted path, such as ``blocks.0.self_attn.q_proj``.

* A list of patterns is one bare regex (``exclude_patterns=.*mlp.*``) or a Python literal
  (``exclude_patterns=[r'.*mlp.*', r'.*v_proj']``).
* A table of patterns is ``regex=value`` pairs with commas between them (``network_reg_dims=.*self_attn.*=8, .*mlp.*=4``).
  Each pair is cut at its last ``=``. A regex with a comma in it goes in quotes: ``"blocks\\.\\d{1,2}\\..*"=8``.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from library.errors import NetworkError, did_you_mean
from networks.layout_names import NameTable

TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off", "none", "")
PAIR = re.compile(r"""\s*(?P<pair>(?:"[^"]*"|'[^']*'|[^,"'])+)\s*(?:,|$)""")

Patterns = tuple[re.Pattern, ...]
PatternTable = tuple[tuple[re.Pattern, Any], ...]
A = TypeVar("A", bound="NetworkArguments")


def parse_bool(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError("give true or false")
    return word in TRUE_WORDS


def parse_probability(value: Any) -> float:
    number = parse_number(value, float)
    if not 0.0 <= number < 1.0:
        raise ValueError("give a number from 0 up to, but not including, 1")
    return number


def parse_ratio(value: Any) -> float:
    number = parse_number(value, float)
    if not (0.0 < number < math.inf):
        raise ValueError("give a number above 0; LoRA+ papers use 16")
    return number


def parse_rate(value: Any) -> float:
    number = parse_number(value, float)
    if not 0.0 <= number < math.inf:
        raise ValueError("give a learning rate: a number, 0 or more")
    return number


def parse_patterns(value: Any) -> Patterns:
    items = _literal(value) if isinstance(value, str) else value
    items = [items] if isinstance(items, str) else items
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError("""give one regular expression, or a list such as "[r'.*mlp.*', r'.*v_proj']" """.rstrip())
    return tuple(compile_pattern(item) for item in items)


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\.' in a literal without the r prefix means itself, and warns
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text.strip()  # a bare regex


def compile_pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"the regular expression {text!r} is not valid: {error}") from error


def parse_ranks(value: Any) -> PatternTable:
    """``regex=rank`` pairs; rank 0 leaves the modules without a LoRA."""
    return _pattern_table(value, int, "a rank: a whole number, 0 or more")


def parse_learning_rates(value: Any) -> PatternTable:
    """``regex=learning rate`` pairs; 0 leaves the modules untrained."""
    return _pattern_table(value, float, "a learning rate: a number, 0 or more")


def _pattern_table(value: Any, kind: Callable[[str], Any], wanted: str) -> PatternTable:
    if not isinstance(value, str):
        raise ValueError("give text such as '.*self_attn.*=8, .*mlp.*=4'")
    table = []
    for pair in _split_pairs(value):
        pattern, found, number = pair.rpartition("=")
        if not found or not pattern.strip():
            raise ValueError(f"{pair!r} is not a pair 'regex=value'; put a regex that contains a comma in quotes")
        try:
            parsed = parse_number(number, kind)
        except ValueError:
            parsed = None
        if parsed is None or parsed < 0 or not math.isfinite(parsed):
            raise ValueError(f"{number.strip()!r} after {pattern.strip()!r} is not {wanted}")
        table.append((compile_pattern(_unquoted(pattern.strip())), parsed))
    return tuple(table)


def _split_pairs(text: str) -> list[str]:
    pairs, position = [], 0
    while position < len(text):
        match = PAIR.match(text, position)
        if not match:
            raise ValueError(
                f"cannot read it from {text[position:].strip()!r} on: give 'regex=value, regex=value', quotes in pairs"
            )
        pairs.append(match["pair"].strip())
        position = match.end()
    return [pair for pair in pairs if pair]


def _unquoted(text: str) -> str:
    text = text[1:] if re.match(r"r[\"']", text) and text[-1] == text[1] else text  # r'...' as in Python
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def parse_number(value: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError("give a whole number" if kind is int else "give a number") from error


def argument(parse: Callable[[Any], Any], help: str, *, default: Any = None) -> Any:
    """One network argument: how its text is read, and what it does."""
    return field(default=default, metadata={"parse": parse, "help": help})


def component_rate(component: str) -> Any:
    """The learning rate of a part of the denoiser. Trainers pass it from the flag of the field's name; 0 = no LoRA there."""
    metadata = {"parse": parse_rate, "help": f"learning rate of {component}, 0 = no LoRA there", "component": component}
    return field(default=None, metadata=metadata)


def component_flags(kind: type[NetworkArguments]) -> tuple[str, ...]:
    """The names of the arguments of ``kind`` that are flags of their own, --self_attn_lr and the like."""
    return tuple(item.name for item in fields(kind) if "component" in item.metadata)


def _instead(name: str, listed: list[str], kind: type[NetworkArguments]) -> str:
    """Of an unknown argument: the network that has it, else the one that is probably meant, else all that there are."""
    from networks.first_checks import modules_with

    if modules := modules_with(name):
        return f": it belongs to {', '.join(modules[:-1])}{' and ' if modules[1:] else ''}{modules[-1]}; drop it"
    if near := did_you_mean(name, listed):
        return f"{near}; see {kind.PAGE}"
    return f"; it knows {', '.join(listed)}"


@dataclass(frozen=True, kw_only=True)
class NetworkArguments:
    """The arguments that every network of this project understands."""

    PAGE: ClassVar[str] = "docs/train_network.md"  # where they are described
    NAMES: ClassVar[NameTable | None] = None  # of the architecture's modules in files of other programs, where it has one
    SELECTING: ClassVar[tuple[str, ...]] = ("exclude_patterns", "include_patterns", "network_reg_dims")  # a file answers them

    exclude_patterns: Patterns = argument(parse_patterns, "modules that get no LoRA", default=())
    include_patterns: Patterns = argument(parse_patterns, "modules that get one although they are excluded", default=())
    network_reg_dims: PatternTable = argument(parse_ranks, "rank by pattern, first match counts, 0 = no LoRA", default=())
    network_reg_lrs: PatternTable = argument(parse_learning_rates, "learning rate by pattern, first match counts", default=())
    dropout: float | None = argument(parse_probability, "as --network_dropout; trainers always pass it")
    rank_dropout: float | None = argument(parse_probability, "chance to drop one rank of one sample")
    module_dropout: float | None = argument(parse_probability, "chance to bypass one LoRA in a forward pass")
    loraplus_lr_ratio: float | None = argument(parse_ratio, "learning rate of lora_up over that of lora_down")
    loraplus_unet_lr_ratio: float | None = argument(parse_ratio, "the same for the denoiser only")
    loraplus_text_encoder_lr_ratio: float | None = argument(parse_ratio, "the same for text encoders only")
    verbose: bool = argument(parse_bool, "log a table of all modules", default=False)

    @property
    def component_rates(self) -> dict[str, float]:
        """{component: learning rate} of those that are given."""
        rates = {item.metadata["component"]: getattr(self, item.name) for item in fields(self) if "component" in item.metadata}
        return {component: rate for component, rate in rates.items() if rate is not None}

    def size_of(self, block: int | None, *, wide: bool, rank: int, alpha: float) -> tuple[int, float]:
        """(rank, alpha) of a module of this block, where ``rank`` and ``alpha`` are the run's; rank 0 = no LoRA.

        ``block`` None: of a model whose blocks are not counted. ``wide``: a convolution other than 1x1.
        """
        return rank, alpha

    @property
    def splits_fused(self) -> bool:
        """Whether each projection of a fused Linear, such as qkv, gets a LoRA of its own."""
        return False

    def block_factor(self, block: int | None) -> float | None:
        """What the learning rate is multiplied by in this block; None where blocks have no rates of their own."""
        return None

    def _idle(self, names: Iterable[str], why: str) -> Iterator[str]:
        """One line about those of ``names`` that are given."""
        if given := [name for name in names if getattr(self, name) is not None]:
            does, it = ("does", "it") if len(given) == 1 else ("do", "them")
            yield f"{', '.join(given[:-1])}{' and ' if given[1:] else ''}{given[-1]} {does} nothing: {why}; drop {it}"

    def problems(self) -> Iterator[str]:
        """What is wrong with the values as they stand together."""
        yield from ()

    def warnings(self) -> Iterator[str]:
        """What is taken, but in another way than it is written."""
        yield from ()


def parse_arguments(kind: type[A], given: Mapping[str, Any]) -> A:
    """Reads the pairs into ``kind``. Raises one NetworkError with every unknown name and every value that cannot be read.

    None stands for "not given": callers in Python, and trainers for ``dropout``, pass it.
    """
    known, flags = {item.name: item for item in fields(kind)}, component_flags(kind)
    listed = [name for name in known if name not in flags]
    problems, values = [], {}
    for name, value in given.items():
        if name not in known:
            problems.append(f"--network_args: {name} is not an argument of this network{_instead(name, listed, kind)}")
        elif value is not None:
            try:
                values[name] = known[name].metadata["parse"](value)
            except ValueError as error:
                place = f"--{name}" if name in flags else f"--network_args: {name}"
                problems.append(f"{place}={value} cannot be used: {error}")
    made = kind(**values)
    if problems := [*problems, *made.problems()]:
        raise NetworkError(*problems)
    return made
