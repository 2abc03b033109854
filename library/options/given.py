"""Option values as one source gives them (the command line, a config file), and what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.files.user_path import PathProblem
from library.options.declare import Option
from library.options.kinds import NUMBER, PATH, TEXT, Unfit
from library.options.scripts import scripts_with

# a number format as others write it -> as options do
OTHER_FORMATS = {
    **dict.fromkeys(("fp32", "float32", "float", "no"), ("no", "float")),
    **dict.fromkeys(("float16", "half"), ("fp16",)),
    "bfloat16": ("bf16",),
}
# a flag of one inference script -> what others call it
OTHER_NAMES = {
    **dict.fromkeys(("save_path", "outdir", "output_dir"), ("output_dir", "save_path")),
    **dict.fromkeys(
        ("pretrained_model_name_or_path", "ckpt", "ckpt_path", "dit"), ("ckpt_path", "dit", "pretrained_model_name_or_path")
    ),
    **dict.fromkeys(("network_weights", "lora_weight", "lora_weights"), ("lora_weights", "lora_weight")),
    **dict.fromkeys(("w", "width", "image_width"), ("image_size", "width", "image_width")),
    **dict.fromkeys(("h", "height", "image_height"), ("image_size", "height", "image_height")),
    "image_size": ("width", "height", "image_width", "image_height"),
    "network_mul": ("lora_multiplier", "lora_weights"),
    **dict.fromkeys(("steps", "infer_steps"), ("infer_steps", "steps")),
    **dict.fromkeys(("scale", "guidance_scale", "cfg_scale"), ("guidance_scale", "cfg_scale")),
    **dict.fromkeys(("vae", "ae", "ae_path"), ("ae_path", "ae")),
    **dict.fromkeys(("gemma2", "gemma2_path"), ("gemma2_path", "gemma2")),
    "t5xxl_max_token_length": ("t5xxl_token_length",),
    "flow_shift": ("discrete_flow_shift",),
}


@dataclass(slots=True)
class Given:
    """Values that were read, the problems met, and the ``doubtful`` options: those that a problem already speaks of."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # option name -> where in a file its value stands
    problems: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def take(self, option: Option, value: object, *, place: str = "") -> None:
        """Reads one value; a value of the wrong type or choice becomes a problem."""
        try:
            self.values[option.name] = option.read(value)
            self.places[option.name] = place
        except PathProblem as problem:
            self.refuse(option, f"{_named(option, place)} {problem}")
        except ValueError as error:
            allowed = str(error) if isinstance(error, Unfit) and not option.is_list else option.allowed
            shown = "***" if option.secret else _shown(value)
            hint = (
                _near_choice(value, tuple(map(str, option.choices)))
                or _words_hint(option, value)
                or (_quotes_hint(option, value, shown) if place else "")
            )
            self.refuse(option, f"{_named(option, place)} is {shown}, but must be {allowed}{hint}")

    def refuse(self, option: Option, problem: str) -> None:
        self.problems.append(problem)
        self.doubtful.add(option.name)


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three option names that ``name`` may have meant: other dashes or case, a beginning, a misspelling."""
    names = list(known)
    wanted = name.strip("-\u2013\u2014").replace("-", "_").lower()
    if wanted in names:
        return [wanted]
    longer = [known_name for known_name in names if wanted and known_name.startswith(wanted)]
    return other_names(wanted, names) or longer[:3] or difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)


def other_names(name: str, known: Iterable[str]) -> list[str]:
    """The options of ``known`` that mean what ``name`` means in another script."""
    return [other for other in OTHER_NAMES.get(name.lower(), ()) if other in known]


def questioned(names: list[str], *, dashes: str = "") -> str:
    """``" (did you mean a or b?)"``, or an empty text for no names."""
    return f" (did you mean {' or '.join(dashes + name for name in names)}?)" if names else ""


def belongs_to_scripts(name: str) -> str:
    """Of an option that this script does not have: ``": it belongs to x.py, not to this script"``, or an empty text."""
    scripts = scripts_with(name)
    if not scripts:
        return ""
    return f": it belongs to {', '.join(scripts[:-1])}{' and ' if scripts[1:] else ''}{scripts[-1]}, not to this script"


def known_options(groups: Iterable[tuple[Option, ...]]) -> Mapping[str, Option]:
    """Name -> option. Two groups with one name would be our own mistake."""
    known: dict[str, Option] = {}
    for options in groups:
        for option in options:
            assert option.name not in known, option.name
            known[option.name] = option
    return known


def _named(option: Option, place: str) -> str:
    return f"{place}: {option.name}" if place else option.flag


def _words_hint(option: Option, value: object) -> str:
    """For several numbers in one word."""
    words = re.split(r"[\s,]+", ",".join(value).strip(",")) if isinstance(value, list) and value and _are_texts(value) else []
    if not option.is_list or option.kind is not NUMBER or len(words) < 2 or not all(_takes(option, word) for word in words):
        return ""
    return f": write them as separate words, with blanks between, {option.flag} {' '.join(words)}"


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _near_choice(value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        return ""
    if same_format := [name for name in OTHER_FORMATS.get(value.lower(), ()) if name in choices]:
        return questioned(same_format)
    same_letters = [choice for choice in choices if choice.lower() == value.lower()]
    return questioned(same_letters or difflib.get_close_matches(value, choices, n=1, cutoff=0.5))


def _quotes_hint(option: Option, value: object, shown: str) -> str:
    """For TOML, where 7 and "7" differ."""
    if option.is_list or isinstance(value, list):
        return ""
    if isinstance(value, str):
        return ": take the quotes away" if value.lower() in ("true", "false") and option.is_switch else ""
    return f': write "{shown}"' if option.kind in (TEXT, PATH) and _takes(option, shown) else ""


def _takes(option: Option, text: str) -> bool:
    try:
        option.read(text)
    except ValueError:
        return False
    return True


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as TOML writes it
    if isinstance(value, list):
        return f"[{', '.join(_shown(element) for element in value)}]"
    return repr(value)
