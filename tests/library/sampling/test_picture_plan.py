"""From prompts to pictures: which setting counts, which seeds there are, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest

from library.errors import OptionError
from library.options.anima_inference import SAMPLERS
from library.options.anima_inference import AnimaPromptOptions as PromptOptions
from library.options.sd_inference import SdxlPromptOptions
from library.sampling.picture_plan import (
    DIFFUSION_SETTINGS,
    LUMINA_SETTINGS,
    Picture,
    SampleDefaults,
    asked_prompt,
    given_prompts,
    idle_negative_warnings,
    line_help,
    pictures_of,
    rounded_side,
    sample_defaults,
    sample_picture,
    sample_warnings,
    sampler_problems,
    size_warnings,
    unused_warnings,
)
from library.sampling.pictures import picture_parameters
from library.sampling.prompts import SamplePrompt


class GivenLoras(NamedTuple):
    """So many LoRA files."""

    count: int
    merged: bool = False

    @property
    def files(self) -> list[tuple[str, float]]:
        return [("a.safetensors", 1.0)] * self.count


def plan(prompt: SamplePrompt, **options: object) -> list[Picture]:
    return pictures_of(prompt, PromptOptions(**options), side_step=16)


def test_the_prompt_wins_over_the_options():
    prompt = SamplePrompt(prompt="a cat", index=0, width=130, height=64, seed=5, sample_steps=3, guidance_scale=2.0,
                          flow_shift=1.5, negative_prompt="", sample_sampler="er_sde")  # fmt: skip
    (picture,) = plan(prompt, seed=9, negative_prompt="rain")
    assert picture == Picture(
        prompt="a cat", negative_prompt="", width=128, height=64, seed=5, steps=3, scale=2.0, shift=1.5, sampler="er_sde"
    )


def test_the_options_stand_in_for_the_rest():
    pictures = plan(
        SamplePrompt(prompt="a cat", index=0), seed=9, images_per_prompt=2, negative_prompt="rain", image_size=[832, 1216]
    )
    assert [picture.seed for picture in pictures] == [9, 10]
    first = pictures[0]
    assert (first.width, first.height, first.steps, first.scale, first.shift) == (1216, 832, 50, 3.5, 5.0)
    assert first.negative_prompt == "rain" and first.sampler == "euler" and first.is_guided


def test_a_scale_of_zero_is_a_scale():
    (picture,) = plan(SamplePrompt(prompt="a cat", index=0, scale=0.0))
    assert picture.scale == 0.0 and picture.is_guided
    (picture,) = plan(SamplePrompt(prompt="a cat", index=0, seed=0, scale=1.0), seed=3)
    assert picture.seed == 0 and not picture.is_guided


def test_random_seeds_differ_and_fit():
    seeds = {plan(SamplePrompt(prompt="a", index=0))[0].seed for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= seed < 2**32 for seed in seeds)


def test_the_largest_seed_counts_on_from_zero():
    pictures = plan(SamplePrompt(prompt="a", index=0, seed=2**63 - 1), images_per_prompt=2)
    assert [picture.seed for picture in pictures] == [2**63 - 1, 0]


@pytest.mark.parametrize(("line", "words"), [
    ("a cat --ss ddim", "--ss ddim is no sampler here: give euler or er_sde"),
    ("a cat --ss er_sd", "(did you mean er_sde?)"),
    ("a cat --l 3 --g 4", "--l 3 and --g 4 both mean the scale"),
    ("a cat --z 3 --w ten", "--z is not a flag"),
    ("a cat --s 1001", "--s (sample_steps) is 1001: give 1 to 1000"),
    ("--d 5", 'the line begins with a flag: write the prompt before it, or "" to draw without one'),
    ("  --n rain a cat", "the line begins with a flag"),
    ("a cat --s 0", "--s (sample_steps) is 0: give 1 to 1000"),
])  # fmt: skip
def test_lines_that_cannot_be_drawn(line, words):
    with pytest.raises(OptionError) as caught:
        asked_prompt(line, SAMPLERS)
    assert words in "\n".join(caught.value.problems)
    assert asked_prompt("a cat --g 4 --l 4", SAMPLERS).scale == 4
    assert asked_prompt("-- a dash", SAMPLERS).prompt == "-- a dash"


def test_an_empty_prompt_is_a_prompt():
    assert asked_prompt('"" --d 5', SAMPLERS) == SamplePrompt(prompt="", index=0, seed=5)
    assert given_prompts(PromptOptions(prompt=""), SAMPLERS) == (SamplePrompt(prompt="", index=0),)
    assert given_prompts(PromptOptions(), SAMPLERS) == ()


def test_the_help_of_a_line_names_every_flag_and_what_counts_without_it():
    text = line_help(PromptOptions(seed=7, image_size=[832, 1216], guidance_scale=2.0), SAMPLERS)
    for words in ("--n TEXT", "[1216, 832]", "seed [7]", "steps [50]", "[2]", "shift of the noise levels [5]", "euler or er_sde"):
        assert words in text


def test_problems_of_a_file_name_file_and_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog --ss lms\na cow --l 1 --g 2\n")
    with pytest.raises(OptionError) as caught:
        given_prompts(PromptOptions(from_file=str(path)), SAMPLERS)
    first, second = caught.value.problems
    assert first.startswith(f"--from_file {path}, prompt 2: --ss lms") and "prompt 3: --l 1" in second
    path.write_text("a cat --q 1\n")
    with pytest.raises(OptionError, match="--from_file .*prompts.txt, line 1: --q is not a flag"):
        given_prompts(PromptOptions(from_file=str(path)), SAMPLERS)


def test_sizes_are_rounded_down_and_told_once():
    assert [rounded_side(side, 16) for side in (64, 79, 80, 1000)] == [64, 64, 80, 992]
    prompts = [SamplePrompt(prompt="a", index=n, width=100) for n in range(3)] + [SamplePrompt(prompt="a", index=3)]
    assert list(size_warnings(prompts, PromptOptions(), 16)) == [
        "sizes are rounded down to multiples of 16 pixels (width x height): 100x1024 to 96x1024"
    ]
    assert not list(size_warnings(prompts[3:], PromptOptions(), 16))


def test_settings_of_other_models_are_told():
    prompts = [SamplePrompt(prompt="a", index=0, cfg_trunc_ratio=0.5), SamplePrompt(prompt="a", index=1, scale=2.0)]
    (warning,) = unused_warnings(prompts)
    assert "--ctr (cfg_trunc_ratio)" in warning and "--l" not in warning


def test_very_large_pictures_are_told():
    prompts = [SamplePrompt(prompt="a", index=0, width=16384, height=16384), SamplePrompt(prompt="a", index=1, width=2048)]
    (warning,) = size_warnings(prompts, PromptOptions(image_size=[2048, 2048]), 16)
    assert "16384x16384 has 256 times the pixels of 1024x1024" in warning and "2048x2048" not in warning
    (warning,) = size_warnings([SamplePrompt(prompt="a", index=0)], PromptOptions(image_size=[2064, 2048]), 16)
    assert "2048x2064 has 4 times" in warning


def test_a_negative_prompt_without_guidance_is_told():
    plain, guided = SamplePrompt(prompt="a", index=0), SamplePrompt(prompt="a", index=1, scale=2.0)
    without = PromptOptions(negative_prompt="rain", guidance_scale=1.0)
    (warning,) = idle_negative_warnings([plain], without)
    assert warning.startswith("the negative prompt does nothing with a guidance scale of 1")
    assert "of 1 of 2 prompts" in next(idle_negative_warnings([plain, guided], without))
    assert not list(idle_negative_warnings([guided], without)) and not list(idle_negative_warnings([plain], PromptOptions()))


@pytest.mark.parametrize("values, cause", [
    ({"scale": 0.5}, "--l 0.5"), ({"cfg_trunc_ratio": 0.0}, "--ctr 0"), ({"scale": 1.0, "cfg_trunc_ratio": 0.0}, "--l 1"),
    ({"cfg_trunc_ratio": 0.1}, None), ({"cfg_trunc_ratio": 2.0}, None), ({}, None),
])  # fmt: skip
def test_a_negative_prompt_of_a_sample_without_guidance_is_told(values, cause):
    prompt = SamplePrompt(prompt="a", index=0, negative_prompt="b", width=1024, height=1024, **values)
    told = [f"prompt 1: --n does nothing with {cause}, which draws without guidance"] if cause else []
    assert list(sample_warnings([prompt], LUMINA_SETTINGS, "lumina", title="Lumina Image 2.0")) == told


def test_what_samples_of_a_training_draw_otherwise_is_told():
    supported = {"negative_prompt", "width", "height", "sample_steps", "scale", "sample_sampler=euler", "sample_sampler=er_sde"}
    odd = SamplePrompt(prompt="a", index=2, sample_sampler="euler_a", sample_steps=5000, negative_prompt="b", scale=1.0,
                       width=16384, renorm_cfg=1.0)  # fmt: skip
    usual = SamplePrompt(prompt="a", index=0, sample_sampler="euler", sample_steps=1000, negative_prompt="b", width=64)
    assert not list(sample_warnings([usual], supported, "anima", title="Anima"))
    unused, sampler, steps, size, negative = sample_warnings([usual, odd], supported, "anima", title="Anima")
    assert unused == "Anima does not use --rcfg (renorm_cfg); the pictures ignore it"
    assert sampler.startswith("Anima does not know --ss euler_a (sample_sampler; known: er_sde, euler)")
    assert steps == "--s 5000 (sample_steps) is cut to 1000: a picture takes 1 to 1000 steps"
    assert "16384x512 has 8 times" in size and negative.startswith("prompt 3: --n does nothing with --l 1")


# ---------------------------------------------------------------- Stable Diffusion


def test_samples_of_a_stable_diffusion_training_have_the_references_defaults():
    assert sample_picture(SamplePrompt(prompt="a", index=0), 3, sampler="ddim", defaults=SampleDefaults()) == Picture(
        prompt="a", negative_prompt="", width=512, height=512, seed=3, steps=30, scale=7.5, sampler="ddim"
    )
    prompt = SamplePrompt(prompt="a", index=0, width=79, height=70, sample_steps=5000, scale=0.5, sample_sampler="heun")
    picture = sample_picture(prompt, 3, sampler="heun", defaults=SampleDefaults())
    assert (picture.width, picture.height, picture.steps, picture.sampler) == (72, 64, 1000, "heun")
    assert picture.scale == 1.0 and not picture.is_guided  # the reference guides above 1 only
    assert picture.shift is None and picture.cfg_trunc_ratio is None and picture.renorm_cfg is None


@pytest.mark.parametrize(("model", "expected"), [
    ("anima", (512, 30, 7.5, 3.0, None, None)), ("sd3", (512, 30, 7.5, 3.0, None, None)),
    ("lumina", (1024, 36, 3.5, 6.0, 0.25, 1.0)),
])  # fmt: skip
def test_samples_of_a_flow_model_have_its_defaults(model, expected):
    prompt = SamplePrompt(prompt="a", index=0)
    picture = sample_picture(prompt, 3, sampler="euler", defaults=sample_defaults(model))
    assert picture.width == picture.height
    found = (picture.width, picture.steps, picture.scale, picture.shift, picture.cfg_trunc_ratio, picture.renorm_cfg)
    assert found == expected
    given = SamplePrompt(prompt="a", index=0, width=111, height=72, flow_shift=2.0, cfg_trunc_ratio=0.0, renorm_cfg=0.0)
    picture = sample_picture(given, 3, sampler="euler", defaults=sample_defaults(model))
    assert (picture.width, picture.height, picture.shift) == (96, 64, 2.0)
    own = (0.0, 0.0) if expected[4] else (None, None)
    assert (picture.cfg_trunc_ratio, picture.renorm_cfg) == own
    assert picture.is_guided == (expected[4] is None)  # a ratio of 0 is no guidance at all


def test_sizes_of_samples_that_are_rounded_are_told_once():
    prompts = [SamplePrompt(prompt="a", index=n, width=100) for n in range(2)] + [SamplePrompt(prompt="a", index=2)]
    assert list(sample_warnings(prompts, {"width"}, "lumina", title="Lumina Image 2.0")) == [
        "sizes are rounded down to multiples of 16 pixels (width x height): 100x1024 to 96x1024"
    ]
    assert list(sample_warnings(prompts, {"width"}, "sdxl", title="SDXL")) == [
        "sizes are rounded down to multiples of 8 pixels (width x height): 100x512 to 96x512"
    ]


@dataclass(frozen=True, kw_only=True)
class GuidedPromptOptions(PromptOptions):
    """With the settings of Lumina."""

    cfg_trunc_ratio: float = 0.25
    renorm_cfg: float = 1.0


def test_settings_of_guidance_come_from_the_line_or_the_options():
    options = GuidedPromptOptions()
    (picture,) = pictures_of(asked_prompt("a", SAMPLERS), options, side_step=16)
    assert (picture.cfg_trunc_ratio, picture.renorm_cfg) == (0.25, 1.0)
    (picture,) = pictures_of(asked_prompt("a --ctr 0.5 --rcfg 0 --d 1", SAMPLERS), options, side_step=16)
    assert (picture.cfg_trunc_ratio, picture.renorm_cfg) == (0.5, 0.0)
    assert "Shift: 5, CFG trunc ratio: 0.5, CFG renorm: 0, Size" in picture_parameters(picture, {})
    text = line_help(options, SAMPLERS)
    assert "--ctr X" in text and "[0.25]" in text and "--rcfg X" in text and "[1]" in text
    assert "--ctr" not in line_help(PromptOptions(), SAMPLERS)
    assert not list(unused_warnings([SamplePrompt(prompt="a", index=0, cfg_trunc_ratio=1.0, renorm_cfg=1.0)], LUMINA_SETTINGS))


def test_an_unknown_sampler_of_a_sample_prompt_is_a_problem():
    prompts = [SamplePrompt(prompt="a", index=0, sample_sampler="ddim"), SamplePrompt(prompt="b", index=1, sample_sampler="dimm")]
    (problem,) = sampler_problems(prompts, ["ddim", "euler"])
    assert problem == "--sample_prompts, prompt 2: --ss dimm is no sampler (did you mean ddim?): give one of ddim, euler"


def test_a_second_prompt_comes_from_the_line_or_the_options():
    options = SdxlPromptOptions(prompt2="fog")
    for prompt, second in (
        (SamplePrompt(prompt="a", index=0), "fog"),
        (asked_prompt("a --p2 a  dog, --ss ddim", ["ddim"]), "a  dog,"),
    ):
        (picture,) = pictures_of(prompt, options, side_step=8)
        assert picture.prompt2 == second and picture.shift is None
    text = line_help(options, ["ddim"], two_prompts=True)
    assert "--p2 TEXT" in text and "[fog]" in text and "--fs" not in text
    assert "--p2" not in line_help(PromptOptions(), SAMPLERS) and "--fs" in line_help(PromptOptions(), SAMPLERS)


@pytest.mark.parametrize(
    ("line", "loras", "words"),
    [
        (
            "a --m 1,2",
            GivenLoras(1),
            "--m 1,2 (lora_multipliers): there are more numbers than LoRA files (1): give at most one for each",
        ),
        ("a --m 1", GivenLoras(0), "--m 1 (lora_multipliers): there are more numbers than LoRA files (0)"),
        ("a --m 0.5", GivenLoras(1, merged=True), "--m 0.5 (lora_multipliers): LoRA files that are merged into the weights"),
    ],
)
def test_strengths_that_lora_files_cannot_have(line, loras, words):
    with pytest.raises(OptionError) as caught:
        asked_prompt(line, SAMPLERS, loras)
    assert words in caught.value.problems[0]


def test_strengths_of_lora_files_come_from_the_line():
    (picture,) = pictures_of(asked_prompt("a --m 0,2", SAMPLERS, GivenLoras(3)), PromptOptions(), side_step=16)
    assert picture.lora_multipliers == (0.0, 2.0)
    assert plan(SamplePrompt(prompt="a", index=0))[0].lora_multipliers == ()
    assert "--m X,X" in line_help(PromptOptions(), SAMPLERS, strengths=[1, 0.5]) and "--m" not in line_help(
        PromptOptions(), SAMPLERS
    )


def test_a_line_as_it_is_typed_for_sd_scripts():
    typed = asked_prompt("a --w832 --h1216 --s30 --d42 --c5.5 --m1,.5 --n -", SAMPLERS, GivenLoras(2))
    assert typed == asked_prompt("a --w 832 --h 1216 --s 30 --d 42 --l 5.5 --m 1,0.5 --n", SAMPLERS)
    assert typed.negative_prompt == "" and asked_prompt("a --c 4 --n --", SAMPLERS).scale == 4
    assert asked_prompt("a --n text --d1", SAMPLERS).negative_prompt == "text"


def test_settings_that_a_model_does_not_draw_by_are_told():
    prompts = [SamplePrompt(prompt="a", index=0, flow_shift=3.0, prompt2="b", guidance_scale=2.0)]
    (warning,) = unused_warnings(prompts, DIFFUSION_SETTINGS)
    assert "--fs (flow_shift), --p2 (prompt2)" in warning and "--g" not in warning


def test_metadata_of_a_picture_without_a_shift():
    (picture,) = pictures_of(SamplePrompt(prompt="a", index=0, seed=1), SdxlPromptOptions(prompt2="b, c"), side_step=8)
    text = picture_parameters(picture, {})
    assert text == 'a\nSteps: 50, Sampler: euler, CFG scale: 7, Seed: 1, Size: 1024x1024, Prompt 2: "b, c"'
