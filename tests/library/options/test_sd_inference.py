"""The options of sd_minimal_inference.py and sdxl_minimal_inference.py: names, defaults, and what cannot be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.declare import groups_of, options_of, warnings_of
from library.options.samples import SAMPLERS
from library.options.sd_inference import USUAL_PROMPT, SdInferenceOptions, SdxlInferenceOptions, split_strength

# every option of the reference's sdxl_minimal_inference.py, with its default there
REFERENCE = {
    "ckpt_path": None, "prompt": "A photo of a cat", "prompt2": None, "negative_prompt": "", "output_dir": ".",
    "lora_weights": None, "interactive": False,
}  # fmt: skip
BOTH = (SdInferenceOptions, SdxlInferenceOptions)


def read(kind: type, *flags: object):
    return read_options(kind, ["--ckpt_path=m.safetensors", *map(str, flags)])


def problems(kind: type, *flags: object) -> str:
    with pytest.raises(OptionError) as caught:
        read(kind, *flags)
    return "\n".join(caught.value.problems)


def test_every_option_of_the_reference_is_there_with_its_default():
    declared = {option.name: option for group in groups_of(SdxlInferenceOptions).values() for option in options_of(group)}
    assert {name: declared[name].default for name in REFERENCE} == REFERENCE
    assert all(option.help for option in declared.values())
    assert read(SdxlInferenceOptions).loras.files == []


def test_the_constants_of_the_reference_are_defaults():
    for kind, side in ((SdInferenceOptions, 512), (SdxlInferenceOptions, 1024)):
        prompts = read(kind).prompts
        assert tuple(prompts.image_size) == (side, side)
        assert (prompts.infer_steps, prompts.guidance_scale, prompts.sampler, prompts.seed) == (50, 7.0, "euler", None)
        assert prompts.flow_shift is None and prompts.prompt == USUAL_PROMPT


@pytest.mark.parametrize("kind", BOTH)
def test_every_sampler_may_be_asked_for(kind):
    assert [read(kind, f"--sampler={name}").prompts.sampler for name in SAMPLERS] == list(SAMPLERS)
    assert "--sampler" in problems(kind, "--sampler=er_sde")


def test_files_and_their_strengths():
    files = read(SdxlInferenceOptions, "--lora_weights", "a.safetensors;0.8", "b;c.safetensors;-1", "d.safetensors").loras.files
    assert files == [("a.safetensors", 0.8), ("b;c.safetensors", -1.0), ("d.safetensors", 1.0)]
    assert split_strength("~/a.safetensors;0.5") == (str(Path.home() / "a.safetensors"), 0.5)
    assert [split_strength(f"a;{text}") for text in ("b", "nan", "inf")] == [("a", None)] * 3
    assert "write FILE;STRENGTH" in problems(SdxlInferenceOptions, "--lora_weights", "a;b")
    assert "--exclude_patterns needs --lora_weights" in problems(SdInferenceOptions, "--exclude_patterns", "x")


@pytest.mark.parametrize("kind", BOTH)
def test_what_goes_together(kind):
    for flags in (["--from_file=p.txt"], ["--interactive"], ["--latent_path", "x"], ["--prompt="], []):
        assert read(kind, *flags)  # the usual prompt stands in the way of none
    assert "--prompt and --from_file are different sources" in problems(kind, "--prompt=a", "--from_file=p.txt")
    assert "--latent_path makes pictures of saved latents" in problems(kind, "--latent_path", "x", "--prompt=a")
    options = read(kind, "--latent_path", "x", "--lora_weights", "a")
    assert options.parts == ("vae",)
    assert any("--lora_weights does nothing" in warning for warning in warnings_of(options))
    with pytest.raises(OptionError, match="--ckpt_path is missing"):
        read_options(kind, [])


def test_what_only_one_of_them_has():
    assert read(SdInferenceOptions, "--v2", "--clip_skip=2").files.clip_skip == 2
    assert read(SdInferenceOptions).prompts.prompt2 is None
    assert read(SdxlInferenceOptions, "--prompt2=b", "--max_token_length=225").prompts.prompt2 == "b"
    for kind, flag in (
        (SdxlInferenceOptions, "--v2"),
        (SdxlInferenceOptions, "--clip_skip=2"),
        (SdInferenceOptions, "--prompt2=a"),
    ):
        assert flag.partition("=")[0] in problems(kind, flag)
    assert "write --p2 TEXT" in problems(SdxlInferenceOptions, "--interactive", "--prompt2=b")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--save_path=x", "--output_dir"),
        ("--pretrained_model_name_or_path=x", "--ckpt_path"),
        ("--network_weights=x", "--lora_weights"),
        ("--lora_weight=x", "--lora_weights"),
        ("--network_mul=1", "--lora_weights"),
        ("--W=512", "--image_size"),
        ("--H=512", "--image_size"),
        ("--steps=20", "--infer_steps"),
        ("--scale=7", "--guidance_scale"),
    ],
)
def test_flags_of_other_inference_scripts(flag, meant):
    for kind in (SdInferenceOptions, SdxlInferenceOptions):
        assert problems(kind, flag) == f"unknown flag {flag.partition('=')[0]} (did you mean {meant}?)"
