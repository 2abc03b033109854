"""Every flag does something, and a test shows it: the table of flag_effects.py is complete and names what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from library.errors import OptionError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.options.config_file import ConfigFileOptions
from library.options.declare import groups_of, options_of
from tests.library.options.flag_effects import AIM_MET, OTHER_WORDS, REFUSED, SHOWN

TESTS = Path(__file__).resolve().parents[2]
PLACES = [(file, test, flag) for file, tests in SHOWN.items() for test, flags in tests.items() for flag in flags.split()]
REQUIRED = """--pretrained_model_name_or_path=dit.safetensors --qwen3=qwen3.safetensors --vae=vae.safetensors
    --dataset_config=my.toml --output_dir=out --network_module=networks.lora_anima"""


def declared() -> list[str]:
    groups = [ConfigFileOptions, *groups_of(AnimaTrainOptions).values()]
    return [option.name for group in groups for option in options_of(group)]


def functions_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_tests_are_found_as_pytest_finds_them():
    assert "test_tests_are_found_as_pytest_finds_them" in functions_in("library/options/test_flag_effects.py")
    assert "functions_in" not in functions_in("library/options/test_flag_effects.py")


def test_every_flag_has_a_row():
    rows = {flag for _, _, flag in PLACES} | set(REFUSED) | set(AIM_MET)
    assert set(declared()) - rows == set(), "no test shows what these do"
    assert rows - set(declared()) == set(), "there are no such flags"


def test_what_is_refused_or_done_anyway_is_nothing_else():
    shown = {flag for _, _, flag in PLACES}
    assert not shown & set(REFUSED) and not shown & set(AIM_MET) and not set(REFUSED) & set(AIM_MET)


@pytest.mark.parametrize("file", SHOWN)
def test_the_tests_are_there_and_speak_of_the_flags(file):
    text = (TESTS / file).read_text(encoding="utf-8")
    assert set(SHOWN[file]) - functions_in(file) == set()
    words = [OTHER_WORDS.get(flag, flag) for flag in " ".join(SHOWN[file].values()).split()]
    assert [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)] == []


@pytest.mark.parametrize("flag", REFUSED)
def test_refused(flag):
    arguments, expected = REFUSED[flag]
    assert f"--{flag}" in arguments
    with pytest.raises(OptionError) as caught:
        read_options(AnimaTrainOptions, [*REQUIRED.split(), *arguments.split()])
    (problem,) = caught.value.problems
    assert expected in problem


@pytest.mark.parametrize("flag", AIM_MET)
def test_aim_met(flag):
    why, place = AIM_MET[flag]
    file, _, test = place.partition("::")
    assert test in functions_in(file) and len(why.split()) > 4
    switch = next(o for g in groups_of(AnimaTrainOptions).values() for o in options_of(g) if o.name == flag).is_switch
    read_options(AnimaTrainOptions, [*REQUIRED.split(), f"--{flag}" if switch else f"--{flag}=x"])  # is taken
