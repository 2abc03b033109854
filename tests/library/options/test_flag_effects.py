"""Every flag of every script does something, and a test shows it: the tables are complete and name what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.errors import OptionError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.options.lumina import LuminaTrainOptions
from library.options.scripts import OPTION_SETS
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.options.sd3 import Sd3TrainOptions
from tests.library.options import flag_effects_sd as sd
from tests.library.options.flag_effects import EVERYWHERE, OTHER_WORDS, Effects
from tests.library.options.flag_effects_anima import ANIMA
from tests.library.options.flag_effects_flow import FLOW, SD3_AND_LUMINA
from tests.library.options.flag_effects_lumina import LUMINA
from tests.library.options.flag_effects_sd3 import SD3
from tests.library.options.reference import declared

TESTS = Path(__file__).resolve().parents[2]
# script -> its options, and the tables that count for it
SCRIPTS: dict[str, tuple[type, tuple[Effects, ...]]] = {
    "train_network.py": (StableDiffusionTrainOptions, (EVERYWHERE, sd.BOTH, sd.SD)),
    "sdxl_train_network.py": (SdxlTrainOptions, (EVERYWHERE, sd.BOTH, sd.SDXL)),
    "sd3_train_network.py": (Sd3TrainOptions, (EVERYWHERE, FLOW, SD3_AND_LUMINA, SD3)),
    "lumina_train_network.py": (LuminaTrainOptions, (EVERYWHERE, FLOW, SD3_AND_LUMINA, LUMINA)),
    "anima_train_network.py": (AnimaTrainOptions, (EVERYWHERE, FLOW, ANIMA)),
}
TABLES = (EVERYWHERE, FLOW, SD3_AND_LUMINA, ANIMA, SD3, LUMINA, sd.BOTH, sd.SD, sd.SDXL)
REQUIRED = "--pretrained_model_name_or_path=model.safetensors --dataset_config=my.toml --output_dir=out"
ALSO_REQUIRED = {
    "train_network.py": "--network_module=networks.lora",
    "sdxl_train_network.py": "--network_module=networks.lora",
    "sd3_train_network.py": "--network_module=networks.lora_sd3",
    "lumina_train_network.py": "--network_module=networks.lora_lumina",
    "anima_train_network.py": "--network_module=networks.lora_anima --qwen3=qwen3.safetensors --vae=vae.safetensors",
}


def shown_by(effects: Effects) -> Iterator[tuple[str, str, str]]:
    """(file, test, flag)"""
    for file, tests in effects.shown.items():
        for test, flags in tests.items():
            yield from ((file, test, flag) for flag in flags.split())


def rows(effects: Effects) -> set[str]:
    return {flag for _, _, flag in shown_by(effects)} | set(effects.refused) | set(effects.aim_met)


def of_script(script: str) -> Effects:
    """All that counts for a script, in one table."""
    shown: dict[str, dict[str, str]] = {}
    for effects in SCRIPTS[script][1]:
        for file, test, flag in shown_by(effects):
            tests = shown.setdefault(file, {})
            tests[test] = f"{tests.get(test, '')} {flag}"
    tables = SCRIPTS[script][1]
    return Effects(
        shown=shown,
        refused={flag: row for table in tables for flag, row in table.refused.items()},
        aim_met={flag: row for table in tables for flag, row in table.aim_met.items()},
    )


def functions_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def read(script: str, *arguments: str):
    return read_options(SCRIPTS[script][0], [*REQUIRED.split(), *ALSO_REQUIRED[script].split(), *arguments])


def test_tests_are_found_as_pytest_finds_them():
    assert "test_tests_are_found_as_pytest_finds_them" in functions_in("library/options/test_flag_effects.py")
    assert "functions_in" not in functions_in("library/options/test_flag_effects.py")


def test_every_script_is_here():
    assert set(SCRIPTS) == set(ALSO_REQUIRED) == set(OPTION_SETS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_row(script):
    options, tables = SCRIPTS[script]
    found = {flag for effects in tables for flag in rows(effects)}
    assert set(declared(options)) - found == set(), "no test shows what these do"
    assert found - set(declared(options)) == set(), "there are no such flags"


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_refused_or_done_anyway_is_nothing_else(script):
    effects = of_script(script)
    shown = {flag for _, _, flag in shown_by(effects)}
    refused, met = set(effects.refused), set(effects.aim_met)
    assert not shown & refused and not shown & met and not refused & met


@pytest.mark.parametrize("file", sorted({file for effects in TABLES for file in effects.shown}))
def test_the_tests_are_there_and_speak_of_the_flags(file):
    text = (TESTS / file).read_text(encoding="utf-8")
    named = [(test, flag) for effects in TABLES for place, test, flag in shown_by(effects) if place == file]
    assert {test for test, _ in named} - functions_in(file) == set()
    words = [OTHER_WORDS.get(flag, flag) for _, flag in named]
    assert [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)] == []


REFUSED = [(script, flag) for script in SCRIPTS for flag in of_script(script).refused]


@pytest.mark.parametrize(("script", "flag"), REFUSED)
def test_refused(script, flag):
    arguments, expected = of_script(script).refused[flag]
    assert f"--{flag}" in arguments
    with pytest.raises(OptionError) as caught:
        read(script, *arguments.split())
    (problem,) = caught.value.problems
    assert expected in problem


AIM_MET = [(script, flag) for script in SCRIPTS for flag in of_script(script).aim_met]


@pytest.mark.parametrize(("script", "flag"), AIM_MET)
def test_aim_met(script, flag):
    why, place = of_script(script).aim_met[flag]
    file, _, test = place.partition("::")
    assert test in functions_in(file) and len(why.split()) > 4
    is_switch = declared(SCRIPTS[script][0])[flag].is_switch
    read(script, f"--{flag}" if is_switch else f"--{flag}=x")  # is taken
