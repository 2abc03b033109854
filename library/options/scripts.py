"""Which training scripts have a flag: for who gives it to another one."""

from __future__ import annotations

from importlib import import_module

from library.options.declare import groups_of, options_of

# script -> where its option set is declared; imported only when a flag is looked for
OPTION_SETS = {
    "train_network.py": ("library.options.sd", "StableDiffusionTrainOptions"),
    "sdxl_train_network.py": ("library.options.sd", "SdxlTrainOptions"),
    "sd3_train_network.py": ("library.options.sd3", "Sd3TrainOptions"),
    "lumina_train_network.py": ("library.options.lumina", "LuminaTrainOptions"),
    "anima_train_network.py": ("library.options.anima", "AnimaTrainOptions"),
}


def option_set_of(script: str) -> type:
    """The option set of a training script, one of ``OPTION_SETS``."""
    module, name = OPTION_SETS[script]
    found: type = getattr(import_module(module), name)
    return found


def scripts_with(name: str) -> list[str]:
    """The training scripts that have the option ``name``, which is written without dashes."""
    return [script for script in OPTION_SETS if name in _names(option_set_of(script))]


def _names(option_set: type) -> set[str]:
    return {option.name for group in groups_of(option_set).values() for option in options_of(group)}
