"""What tools/cache_latents.py and tools/cache_text_encoder_outputs.py share: the architectures there are, and the way of both."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from library.anima.architecture import ANIMA
from library.errors import OptionError, user_errors_end_the_script
from library.lumina.architecture import LUMINA
from library.options.anima import AnimaTrainOptions
from library.options.cache_tool import read_cache_tool_options
from library.options.lumina import LuminaTrainOptions
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.options.sd3 import Sd3TrainOptions
from library.options.train import TrainOptions
from library.sd.architecture import STABLE_DIFFUSION
from library.sd3.architecture import SD3
from library.sdxl.architecture import SDXL
from library.training.architecture import Architecture
from library.training.cache_job import checked_job, fill


@dataclass(frozen=True, slots=True)
class ToolArchitecture:
    """An architecture that can be cached for: its options, and the trainer class that encodes (imported late: it needs torch)."""

    options: type[TrainOptions]
    architecture: Architecture
    script: str
    trainer: str


DEFAULT = "sd"  # as in the tools of kohya-ss/sd-scripts
# by switch, but for the default, which has none
ARCHITECTURES = {
    DEFAULT: ToolArchitecture(StableDiffusionTrainOptions, STABLE_DIFFUSION, "train_network", "StableDiffusionTrainer"),
    "sdxl": ToolArchitecture(SdxlTrainOptions, SDXL, "sdxl_train_network", "SdxlNetworkTrainer"),
    "sd3": ToolArchitecture(Sd3TrainOptions, SD3, "sd3_train_network", "Sd3NetworkTrainer"),
    "lumina": ToolArchitecture(LuminaTrainOptions, LUMINA, "lumina_train_network", "LuminaNetworkTrainer"),
    "anima": ToolArchitecture(AnimaTrainOptions, ANIMA, "anima_train_network", "AnimaNetworkTrainer"),
}
# how messages name the script for a model of another kind: ``described`` of library/files/model_path.py
SCRIPTS = "|".join(each.script for each in ARCHITECTURES.values())
TRAINED_ELSEWHERE = re.compile(rf"\b(?P<script>{SCRIPTS})\.py(?P<flags>( --\w+)*) trains those")
# switches of the tools of kohya-ss/sd-scripts, and what one may expect beside them, for which there is no trainer here yet
NOT_HERE = {"flux": "FLUX"}


def run_tool(part: str, argv: Sequence[str] | None = None) -> None:
    """Caches what ``part`` of the model ("vae" or "text") makes, as the command line says."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with user_errors_end_the_script():
        chosen = chosen_architecture(arguments)

    def reworded(text: str) -> str:
        return with_switches(text, chosen)

    data = checked_job(
        lambda: read_cache_tool_options(chosen.options, part, arguments), chosen.architecture, part, reworded=reworded
    )
    fill(getattr(importlib.import_module(chosen.script), chosen.trainer), data, part)


def chosen_architecture(arguments: Sequence[str]) -> ToolArchitecture:
    """The one whose switch is given; without one, Stable Diffusion 1.x and 2.x. Raises OptionError naming those that exist."""
    switches = {word[2:].removesuffix("=true") for word in arguments if word.startswith("--")}
    if absent := [name for name in NOT_HERE if name in switches]:
        raise OptionError(f"--{absent[0]}: there is no caching for {NOT_HERE[absent[0]]} here yet; there is: {_names()}")
    if shortened := [name for name in ARCHITECTURES if any(word and word != name and name.startswith(word) for word in switches)]:
        raise OptionError(f"--{shortened[0]} is to be written in full: it decides which other flags there are")
    given = [name for name in ARCHITECTURES if name in switches and name != DEFAULT]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(f'--{name}' for name in given)} are given together: choose one")
    return ARCHITECTURES[given[0] if given else DEFAULT]


def with_switches(text: str, chosen: ToolArchitecture) -> str:
    """A message about another architecture's model names the script that trains it: here it names the switch instead."""
    given = next(name for name, each in ARCHITECTURES.items() if each == chosen)

    def advice(mark: re.Match[str]) -> str:
        wanted = next(name for name, each in ARCHITECTURES.items() if each.script == mark["script"])
        if wanted == given:  # of this architecture after all, but for a flag
            return f"add{mark['flags']}" if mark["flags"] else mark[0]
        steps = [f"drop --{given}"] if given != DEFAULT else []
        added = [f"--{wanted}"] if wanted != DEFAULT else []
        added += mark["flags"].split()
        return " and ".join([*steps, *([f"add {' '.join(added)}"] if added else [])])

    return TRAINED_ELSEWHERE.sub(advice, text)


def _names() -> str:
    *others, last = (f"--{name}" for name in ARCHITECTURES if name != DEFAULT)
    return f"{', '.join(others)} or {last}, and without a switch Stable Diffusion 1.x and 2.x"
