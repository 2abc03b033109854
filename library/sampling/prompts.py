"""Prompt files for sample pictures: .txt (one prompt a line, flags after it), .toml and .json. Needs no torch.

Differs from the reference where it loses what a user wrote: the prompt itself is never taken for a flag, an unknown or
broken flag is an error, a TOML subset may override a shared key, and values are converted the same way in all formats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from library.errors import OptionError, did_you_mean
from library.files.text_file import read_utf8

MIN_SIDE_PX, MAX_SIDE_PX = 64, 16384
MAX_STEPS = 1000
FLAGS = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "g": "guidance_scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
    "p2": "prompt2",
    "m": "lora_multipliers",
}
TEXTS = ("negative_prompt", "prompt2")  # kept as they are
FLAG_START = re.compile(r" --(?=[A-Za-z])")  # " -- " with a space after it is a dash in the text


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrompt:
    """One picture to draw. None: the architecture's default."""

    prompt: str
    index: int  # place in the file, from 0, comments and blank lines not counted; part of the picture's name
    negative_prompt: str | None = None
    width: int | None = None  # pixels, before the architecture rounds down to its step
    height: int | None = None
    seed: int | None = None
    sample_steps: int | None = None  # as written: what draws takes 1 to MAX_STEPS
    scale: float | None = None  # of classifier-free guidance
    guidance_scale: float | None = None  # distilled guidance
    flow_shift: float | None = None
    sample_sampler: str | None = None
    controlnet_image: str | None = None
    cfg_trunc_ratio: float | None = None  # part of the run with guidance
    renorm_cfg: float | None = None  # cap of the guided prediction's norm, relative to the plain one
    prompt2: str | None = None  # another text for the second text encoder of SDXL, when pictures are drawn without training
    lora_multipliers: tuple[float, ...] | None = None  # strengths of the LoRA files, in their order, of SD3 and Lumina then

    def settings(self) -> dict[str, object]:
        """What the file sets besides the prompt itself, by key."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None and name not in ("prompt", "index")}

    def unused(self, for_supported: Iterable[str]) -> list[str]:
        """The settings of this prompt that are not among ``for_supported``, each as its flag and key. What is supported is a key,
        or where only some values are, each of them as ``key=value``; other values are told by ``unknown_values``."""
        supported = {name.partition("=")[0] for name in for_supported}
        return [_shown(key) for key in self.settings() if key not in supported]

    def unknown_values(self, for_supported: Iterable[str]) -> list[str]:
        """The settings of which only other values are supported: ``--ss ddim (sample_sampler; known: er_sde, euler)``."""
        known = {
            key: known_values(key, for_supported) for key, equals, _ in (name.partition("=") for name in for_supported) if equals
        }
        return [
            _shown(key, value=value, more=f"; known: {', '.join(known[key])}")
            for key, value in self.settings().items()
            if key in known and value not in known[key]
        ]


def known_values(key: str, supported: Iterable[str]) -> list[str]:
    """Those that are supported of a setting (see ``SamplePrompt.unused``), sorted."""
    return sorted(value for name, equals, value in (name.partition("=") for name in supported) if equals and name == key)


def read_prompts(path: Path, *, flag: str = "--sample_prompts") -> list[SamplePrompt]:
    """All prompts of the file, in its order. ``flag``: what named the file, for messages.

    Raises OptionError with everything that is wrong: the file, its syntax, and each bad line or key with its place.
    """
    readers: dict[str, Callable[[str, str], Entries]] = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise OptionError(f"{flag} {path}: a prompt file ends in .txt, .toml or .json")
    problems: list[str] = []
    prompts: list[SamplePrompt] = []
    for place, entry in reader(read_utf8(path, error=OptionError, flag=flag), f"{flag} {path}"):
        found = list(_problems(entry))
        problems += [f"{flag} {path}, {place}: {problem}" for problem in found]
        if not found:
            prompts.append(_sample_prompt(entry, len(prompts)))
    if problems:
        raise OptionError(*problems)
    if not prompts:
        raise OptionError(f"{flag} {path} holds no prompt: write one per line, or drop the flag")
    return prompts


def read_prompt_line(line: str) -> SamplePrompt:
    """The prompt of one line, written as in a .txt file. Raises OptionError with everything that is wrong."""
    entry = _parse_line(line.strip())
    if problems := list(_problems(entry)):
        raise OptionError(*problems)
    return _sample_prompt(entry, 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt as written: values by key, and words that are no flag."""

    values: Mapping[str, object]
    unknown: tuple[str, ...] = ()


Entries = Iterator[tuple[str, Entry]]  # the place inside the file ("line 3"), the entry


def _from_text(text: str, file: str) -> Entries:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            yield f"line {number}", _parse_line(line.strip())


def _parse_line(line: str) -> Entry:
    prompt, *pieces = FLAG_START.split(line)
    values: dict[str, object] = {"prompt": prompt}
    unknown = []
    for piece in pieces:
        word, _, value = piece.partition(" ")
        key = FLAGS.get(word.lower())
        if key is None:
            unknown.append(word)
        else:
            values[key] = value if key in TEXTS else value.strip()
    return Entry(values, tuple(unknown))


def _from_toml(text: str, file: str) -> Entries:
    import toml

    try:
        document = toml.loads(text)
    except (ValueError, IndexError, TypeError) as error:  # the parser's own error is a ValueError; it leaks the others
        raise OptionError(f"{file} is not valid TOML: {error}") from error
    table = document.get("prompt")
    if not isinstance(table, dict) or set(document) != {"prompt"}:
        raise OptionError(f"{file} needs one table [prompt], with [[prompt.subset]] tables for several pictures")
    shared = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise OptionError(f"{file}: write each picture as a table [[prompt.subset]]")
    for number, subset in enumerate(subsets, start=1):
        yield f"[[prompt.subset]] {number}", Entry({**shared, **subset})


def _from_json(text: str, file: str) -> Entries:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(document, list) or not all(isinstance(item, dict | str) for item in document):
        raise OptionError(f"{file} must hold a list; each item an object, or a string like a line of a .txt file")
    for number, item in enumerate(document, start=1):
        yield f"item {number}", _parse_line(item.strip()) if isinstance(item, str) else Entry(item)


def _problems(entry: Entry) -> Iterator[str]:
    for word in entry.unknown:
        yield f"--{word} is not a flag of a prompt line{_near_flag(word)}; known: {', '.join(f'--{flag}' for flag in FLAGS)}"
    if not isinstance(entry.values.get("prompt"), str):
        yield 'there is no prompt = "text"'
    for key, value in entry.values.items():
        if key != "prompt":
            problem = _value_problem(key, value)
            if problem:
                yield problem


def _near_flag(word: str) -> str:
    near = did_you_mean(word.lower(), [*FLAGS, *FLAGS.values()])
    for key in FLAGS.values():
        near = near.replace(f"mean {key}?", f"mean {_shown(key)}?")
    return near


def _value_problem(key: str, value: object) -> str | None:
    if key not in FIELDS:
        return f"{key} is not a key of a prompt{did_you_mean(key, ['prompt', *FIELDS])}"
    try:
        FIELDS[key](value)
    except (ValueError, TypeError, OverflowError) as error:
        return f"{_shown(key)} {value!r}: {error}"
    return None


def _sample_prompt(entry: Entry, index: int) -> SamplePrompt:
    settings = {key: FIELDS[key](value) for key, value in entry.values.items() if key != "prompt"}
    return SamplePrompt(prompt=str(entry.values["prompt"]), index=index, **settings)  # type: ignore[arg-type]


def _shown(key: str, *, value: object = None, more: str = "") -> str:
    flag = next(flag for flag, name in FLAGS.items() if name == key)
    return f"--{flag}{'' if value is None else f' {value}'} ({key}{more})"


def _side(value: object) -> int:
    side = _whole(value)
    if not MIN_SIDE_PX <= side <= MAX_SIDE_PX:
        raise ValueError(f"must be from {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels")
    return side


def _seed(value: object) -> int:
    seed = _whole(value)
    if not 0 <= seed < 2**63:
        raise ValueError("must be from 0 to 2^63 - 1; leave it out for a seed derived from the run's")
    return seed


def _whole(value: object) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)  # not through a float, which would round a long seed
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    if number != int(number):
        raise ValueError("must be a whole number")
    return int(number)


def _shift(value: object) -> float:
    shift = _number(value)
    if shift <= 0:
        raise ValueError("must be more than 0")
    return shift


def _factor(value: object) -> float:
    factor = _number(value)
    if factor < 0:
        raise ValueError("must not be negative")
    return factor


def _number(value: object) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError("must be a number")


def _numbers(value: object) -> tuple[float, ...]:
    """A list, a single number, or numbers with commas between."""
    numbers = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if not numbers:
        raise ValueError("needs a number")
    try:
        return tuple(map(_number, numbers))
    except ValueError as error:
        raise ValueError("must be numbers with commas between them, such as 1,0.5") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")
    return value


def _name(value: object) -> str:
    if not _text(value):
        raise ValueError("needs a value")
    return _text(value)


FIELDS: Mapping[str, Callable[[object], object]] = {  # key -> checks and converts; raises ValueError with what is allowed
    "negative_prompt": _text,
    "prompt2": _text,
    "width": _side,
    "height": _side,
    "seed": _seed,
    "sample_steps": _whole,
    "scale": _factor,
    "guidance_scale": _factor,
    "flow_shift": _shift,
    "sample_sampler": _name,
    "controlnet_image": _name,
    "cfg_trunc_ratio": _factor,
    "renorm_cfg": _factor,
    "lora_multipliers": _numbers,
}
