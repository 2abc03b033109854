"""Prompt files: what they say, and what is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from library.errors import OptionError
from library.sampling.prompts import SamplePrompt, read_prompt_line, read_prompts


@pytest.fixture
def read(tmp_path):
    def run(text, name="prompts.txt"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return read_prompts(path)

    return run


@pytest.fixture
def refusal(read):
    def run(text, name="prompts.txt"):
        with pytest.raises(OptionError) as caught:
            read(text, name)
        return caught.value.problems

    return run


def test_every_flag_of_a_line(read):
    line = (
        "a cat --w 512 --h 768 --d 42 --s 28 --l 7.5 --g 3 --n bad, ugly --ss euler_a --cn a b.png --ctr 0.6 --rcfg 0.2 --fs 2.5"
    )
    assert read(line) == [
        SamplePrompt(
            prompt="a cat", index=0, width=512, height=768, seed=42, sample_steps=28, scale=7.5, guidance_scale=3.0,
            negative_prompt="bad, ugly", sample_sampler="euler_a", controlnet_image="a b.png", cfg_trunc_ratio=0.6,
            renorm_cfg=0.2, flow_shift=2.5,
        )
    ]  # fmt: skip


def test_strengths_of_lora_files(read, refusal):
    (from_text,) = read("a --m 1, 0.5,-2")
    (from_json,) = read(json.dumps([{"prompt": "a", "lora_multipliers": [1, 0.5, -2]}]), "p.json")
    assert from_text.lora_multipliers == from_json.lora_multipliers == (1.0, 0.5, -2.0)
    assert read('[prompt]\nprompt = "a"\nlora_multipliers = 0.5\n', "p.toml")[0].lora_multipliers == (0.5,)
    for line in ("a --m", "a --m 1,,2", "a --m high"):
        (problem,) = refusal(line)
        assert "--m (lora_multipliers)" in problem and "must be numbers with commas between them, such as 1,0.5" in problem


def test_a_prompt_without_flags_leaves_everything_to_the_architecture(read):
    (prompt,) = read("dog in the rain\n")
    assert prompt.settings() == {}


def test_comments_and_blank_lines_do_not_count(read):
    prompts = read("# note\n\nfirst\n   \n # an indented one is a prompt\nlast")
    assert [(p.index, p.prompt) for p in prompts] == [(0, "first"), (1, "# an indented one is a prompt"), (2, "last")]


def test_the_prompt_itself_is_never_a_flag(read):
    assert read("n cat --w 64\nw 100\ns 3 --h 64")[0] == SamplePrompt(prompt="n cat", index=0, width=64)
    assert [p.prompt for p in read("w 100\n--n at the start is text")] == ["w 100", "--n at the start is text"]


def test_a_dash_with_a_space_after_it_is_text(read):
    (prompt,) = read("day -- and night --d 5 --n grey -- dull")
    assert (prompt.prompt, prompt.negative_prompt, prompt.seed) == ("day -- and night", "grey -- dull", 5)


def test_flags_ignore_case_and_the_last_one_wins(read):
    (prompt,) = read("x --W 640 --s 5000 --S 3 --d 9223372036854775807")
    assert (prompt.width, prompt.sample_steps, prompt.seed) == (640, 3, 2**63 - 1)


def test_steps_stay_as_written(read):
    """Who draws decides: training cuts them and says so, the inference script refuses them."""
    assert [p.sample_steps for p in read("x --s 5000\nx --s 0")] == [5000, 0]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes("﻿# comment\nchat écaille\n".encode())
    assert [p.prompt for p in read_prompts(tmp_path / "p.txt")] == ["chat écaille"]


def test_toml_shares_keys_and_a_subset_overrides_them(read):
    text = """
[prompt]
width = 512
sample_steps = "12"
negative_prompt = "blurry"
[[prompt.subset]]
prompt = "a"
width = 640
[[prompt.subset]]
prompt = "b"
seed = 7
"""
    first, second = read(text, "p.toml")
    assert (first.prompt, first.width, first.sample_steps, first.negative_prompt) == ("a", 640, 12, "blurry")
    assert (second.prompt, second.width, second.seed, second.index) == ("b", 512, 7, 1)


def test_toml_with_one_prompt_needs_no_subset(read):
    assert read('[prompt]\nprompt = "only"\nflow_shift = "3"', "p.toml") == [SamplePrompt(prompt="only", index=0, flow_shift=3.0)]


def test_json_takes_objects_and_lines(read):
    prompts = read(json.dumps([{"prompt": "a", "height": 96, "scale": 4}, "b --h 128"]), "p.JSON")
    assert [(p.prompt, p.height, p.scale) for p in prompts] == [("a", 96, 4.0), ("b", 128, None)]


def test_several_mistakes_are_told_together_with_their_places(refusal):
    problems = refusal("fine\na cat --w 64 --wdith 64\nb --h 32 --d -5\n")
    assert len(problems) == 3
    assert "prompts.txt, line 2" in problems[0] and "--wdith" in problems[0] and "--w (width)" in problems[0]
    assert "line 3" in problems[1] and "--h (height) '32'" in problems[1] and "64 to 16384" in problems[1]
    assert "--d (seed)" in problems[2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("z --w notanumber", "must be a number"),
        ("a --w 512.5", "whole number"),
        ("a --w 100000", "16384 pixels"),
        ("a --w", "must be a number"),
        ("a --l nan", "must be a number"),
        ("a --l -1", "negative"),
        ("a --fs 0", "more than 0"),
        ("a --ss", "needs a value"),
        ("a --steps 3", "--steps is not a flag"),
    ],
)
def test_a_bad_value_is_refused(refusal, line, words):
    (problem,) = refusal(line)
    assert words in problem and "line 1" in problem


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.toml", '[prompt]\nprompt = "a"\nwidht = 64', ["[[prompt.subset]] 1", "widht", "did you mean width?"]),
        ("p.toml", "[prompt]\nwidth = 64", ["there is no prompt"]),
        ("p.toml", "[prompt\n", ["not valid TOML"]),
        ("p.toml", 'width = 3\n[prompt]\nprompt = "a"', ["[prompt]"]),
        ("p.toml", '[prompt]\nprompt = "a"\nwidth = true', ["--w (width) True", "must be a number"]),
        ("p.toml", '[prompt]\nprompt = "a"\nnegative_prompt = 3', ["must be a text"]),
        ("p.json", '{"prompt": "a"}', ["must hold a list"]),
        ("p.json", '[{"prompt": "a"},', ["not valid JSON"]),
        ("p.json", '[{"prompt": "a", "height": 3}]', ["item 1", "--h (height) 3"]),
        ("p.yaml", "a", [".txt, .toml or .json"]),
        ("p.txt", "\n# only a comment\n", ["holds no prompt"]),
    ],
)
def test_a_bad_file_is_refused(refusal, name, text, words):
    (problem,) = refusal(text, name)
    assert name in problem and all(word in problem for word in words), problem


def test_a_missing_file_and_a_wrong_encoding(tmp_path):
    with pytest.raises(OptionError, match="nothing.txt cannot be read"):
        read_prompts(tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(OptionError, match="byte 3 is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_unused_names_what_an_architecture_would_ignore(read):
    (prompt,) = read("a --ss ddim --w 64 --g 2")
    assert prompt.unused({"prompt", "width"}) == ["--g (guidance_scale)", "--ss (sample_sampler)"]
    assert prompt.unused({"width", "sample_sampler", "guidance_scale"}) == []


def test_reading_prompts_needs_no_torch():
    code = "import sys, library.sampling.prompts; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_some_values_of_a_setting_may_be_of_use(read):
    prompts = read("a cat --ss er_sde\na cat --ss ddim --ctr 0.5\n")
    supported = {"sample_sampler=euler", "sample_sampler=er_sde"}
    assert [prompt.unused(supported) for prompt in prompts] == [[], ["--ctr (cfg_trunc_ratio)"]]
    told = ["--ss ddim (sample_sampler; known: er_sde, euler)"]
    assert [prompt.unknown_values(supported) for prompt in prompts] == [[], told]


def test_a_line_that_someone_types():
    assert read_prompt_line("  a cat --d 5 --n rain\n") == SamplePrompt(prompt="a cat", index=0, seed=5, negative_prompt="rain")
    with pytest.raises(OptionError) as caught:
        read_prompt_line("a cat --d x --u 3")
    assert len(caught.value.problems) == 2 and "--u is not a flag" in caught.value.problems[0]
