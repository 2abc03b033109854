"""What shows of a run's network before torch is imported: a module, arguments or LoRA files that are for another model.

Of this project's own network modules; what other people's understand is not known.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.errors import CheckpointError, NetworkError
from library.files.safetensors_file import SafetensorsHeader, read_header
from library.training.models.networks import OWN_PACKAGE, network_arguments, own_network_modules

BASES = ("sd_v1", "sd_v2", "sdxl")  # how ss_base_model_version begins, of files for Stable Diffusion


def network_problems(options: Any, architecture: str) -> Iterator[str]:
    """``architecture``: its name. A module that is not there, and files that cannot be read, are told elsewhere."""
    module = options.network.network_module
    try:
        arguments = network_arguments(options.network.network_args)
    except NetworkError as error:
        yield from error.problems
        arguments = {}
    if module not in own_network_modules():
        return
    checks = importlib.import_module(f"{OWN_PACKAGE}.first_checks")
    if module not in (options.NETWORK_MODULE, *options.OTHER_NETWORK_MODULES):
        yield (
            f"--network_module={module} is for {checks.MODELS.get(module, 'another model')}, and this script trains "
            f"{options.MODEL}: give --network_module={options.NETWORK_MODULE}"
        )
        return
    kind = checks.arguments_class(architecture, v2=_is_v2(options))
    if kind is not None:
        yield from checks.argument_problems(kind, arguments)
        for flag, header in lora_headers(options):
            if problem := checks.file_problem(kind, flag, header.path, header.tensors):
                yield problem


def network_notices(options: Any, architecture: str) -> Iterator[str]:
    """LoRA files that were trained on another Stable Diffusion than this run's, as their metadata says."""
    own = {"sd": "sd_v2" if _is_v2(options) else "sd_v1", "sdxl": "sdxl"}.get(architecture)
    for flag, header in lora_headers(options):
        base = base_model(header.metadata)
        if own and base.startswith(BASES) and not base.startswith(own):
            yield (
                f"{flag} {header.path}: its metadata says that it was trained on {base}, and this run's model is {own}: what it "
                "has learned means nothing to another model; choose a file made for this one"
            )


def base_model(metadata: dict[str, str]) -> str:
    """``ss_base_model_version``, else what ``ss_v2`` says; empty where neither is there."""
    by_v2 = {"True": "sd_v2", "False": "sd_v1"}.get(metadata.get("ss_v2", ""), "")
    return metadata.get("ss_base_model_version", by_v2)


def lora_headers(options: Any) -> Iterator[tuple[str, SafetensorsHeader]]:
    """(flag, header) of each LoRA file that the run reads; pickles have none."""
    network = options.network
    files = [("--network_weights", network.network_weights), *(("--base_weights", file) for file in network.base_weights or ())]
    for flag, file in files:
        if file and Path(file).suffix == ".safetensors" and Path(file).is_file():
            with suppress(CheckpointError):
                yield flag, read_header(Path(file))


def _is_v2(options: Any) -> bool:
    return bool(getattr(options.clip, "v2", False))
