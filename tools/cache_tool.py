"""What tools/cache_latents.py and tools/cache_text_encoder_outputs.py share: the architectures there are, and the way of both."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from library.anima.architecture import ANIMA
from library.errors import OptionError, user_errors_end_the_script
from library.options.anima import AnimaTrainOptions
from library.options.cache_tool import read_cache_tool_options
from library.options.train import TrainOptions
from library.training.architecture import Architecture
from library.training.cache_job import checked_job, fill


@dataclass(frozen=True, slots=True)
class ToolArchitecture:
    """An architecture that can be cached for: its options, and the trainer class that encodes (imported late: it needs torch)."""

    options: type[TrainOptions]
    architecture: Architecture
    script: str
    trainer: str


ARCHITECTURES = {"anima": ToolArchitecture(AnimaTrainOptions, ANIMA, "anima_train_network", "AnimaNetworkTrainer")}
# switches of the tools of kohya-ss/sd-scripts, and what one may expect beside them, for which there is no trainer here yet
NOT_HERE = {"v2": "Stable Diffusion 2.x", "sdxl": "SDXL", "sd3": "SD3", "lumina": "Lumina Image 2.0", "flux": "FLUX"}


def run_tool(part: str, argv: Sequence[str] | None = None) -> None:
    """Caches what ``part`` of the model ("vae" or "text") makes, as the command line says."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with user_errors_end_the_script():
        chosen = chosen_architecture(arguments)
    data = checked_job(lambda: read_cache_tool_options(chosen.options, part, arguments), chosen.architecture, part)
    fill(getattr(importlib.import_module(chosen.script), chosen.trainer), data, part)


def chosen_architecture(arguments: Sequence[str]) -> ToolArchitecture:
    """The one whose switch is given; for --help alone the first. Raises OptionError naming those that exist."""
    switches = {word[2:].removesuffix("=true") for word in arguments if word.startswith("--")}
    if absent := [name for name in NOT_HERE if name in switches]:
        raise OptionError(f"--{absent[0]}: there is no caching for {NOT_HERE[absent[0]]} here yet; there is: {_names()}")
    given = [name for name in ARCHITECTURES if name in switches]
    if len(given) == 1:
        return ARCHITECTURES[given[0]]
    if given:
        raise OptionError(f"{' and '.join(f'--{name}' for name in given)} are given together: choose one")
    if "help" in switches or "-h" in arguments:
        return next(iter(ARCHITECTURES.values()))
    raise OptionError(
        f"the switch of the architecture is missing: give {_names()} (without one, kohya-ss/sd-scripts takes Stable Diffusion "
        "1.x, for which there is no caching here yet)"
    )


def _names() -> str:
    return " or ".join(f"--{name}" for name in ARCHITECTURES)
