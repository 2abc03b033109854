"""What shows of a network before torch is imported: arguments that are wrong, LoRA files for another model.

The trainers ask this for this project's own network modules (library/training/models/network_checks.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from library.errors import NetworkError
from networks.anima_arguments import AnimaArguments
from networks.arguments import NetworkArguments, component_flags, parse_arguments
from networks.lora_names import names_problem
from networks.lumina_arguments import LuminaArguments
from networks.sd3_arguments import Sd3Arguments
from networks.sd_arguments import Sd1Arguments, Sd2Arguments, SdxlArguments

MODELS = {  # what each module is for
    "networks.lora": "Stable Diffusion 1.x, 2.x, SDXL and 3",
    "networks.lora_anima": "Anima",
    "networks.lora_lumina": "Lumina Image 2.0",
    "networks.lora_sd3": "Stable Diffusion 3",
}

ARGUMENTS = {
    "networks.lora": (Sd1Arguments, Sd2Arguments, SdxlArguments),
    "networks.lora_anima": (AnimaArguments,),
    "networks.lora_lumina": (LuminaArguments,),
    "networks.lora_sd3": (Sd3Arguments,),
}


def arguments_class(architecture: str, *, v2: bool) -> type[NetworkArguments] | None:
    """``architecture``: the name that it has in caches; ``v2``: of Stable Diffusion it is 2.x. None where nothing is known."""
    known = {
        "anima": AnimaArguments,
        "lumina": LuminaArguments,
        "sd": Sd2Arguments if v2 else Sd1Arguments,
        "sd3": Sd3Arguments,
        "sdxl": SdxlArguments,
    }
    return known.get(architecture)


def modules_with(name: str) -> list[str]:
    """This project's network modules that have the argument ``name``, by the first that is for each model."""
    return [module for module, kinds in ARGUMENTS.items() if any(name in known_arguments(kind) for kind in kinds)]


def known_arguments(kind: type[NetworkArguments]) -> set[str]:
    """Those of --network_args: what is a flag of its own is none."""
    return {item.name for item in fields(kind)} - set(component_flags(kind))


def argument_problems(kind: type[NetworkArguments], given: Mapping[str, Any]) -> Iterator[str]:
    """Of the pairs of --network_args: unknown names, and values that cannot be read. Those that are flags of their own, which the
    trainer tells, are left out."""
    flags = component_flags(kind)
    try:
        parse_arguments(kind, {name: value for name, value in given.items() if name not in flags})
    except NetworkError as error:
        yield from error.problems


def file_problem(kind: type[NetworkArguments], flag: str, file: object, keys: Iterable[str]) -> str | None:
    """Why a LoRA file with these tensors is none for the model; None where nothing is seen."""
    return None if kind.NAMES is None else names_problem(f"{flag} {file}", keys, kind.NAMES)
