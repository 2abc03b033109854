"""The options of anima_minimal_inference.py: names, defaults, and what cannot be right."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.options.anima_inference import SAMPLERS, AnimaInferenceOptions
from library.options.command_line import read_options
from library.options.declare import groups_of, options_of, warnings_of

DRAWING = ["--save_path=out", "--prompt=a cat"]
# every option of the script of this name in kohya-ss/sd-scripts, with its default there
REFERENCE = {
    "dit": None, "vae": None, "vae_chunk_size": None, "vae_disable_cache": False, "text_encoder": None, "lora_weight": None,
    "lora_multiplier": None, "include_patterns": None, "exclude_patterns": None, "guidance_scale": 3.5, "prompt": None,
    "negative_prompt": "", "image_size": (1024, 1024), "infer_steps": 50, "save_path": None, "seed": None, "flow_shift": 5.0,
    "fp8": False, "fp8_scaled": False, "text_encoder_cpu": False, "device": None, "attn_mode": None, "output_type": "images",
    "no_metadata": False, "latent_path": None, "lycoris": False, "from_file": None, "interactive": False,
}  # fmt: skip


def read(*flags: object) -> AnimaInferenceOptions:
    return read_options(AnimaInferenceOptions, [*DRAWING, *map(str, flags)])


def problems(*flags: object, base=DRAWING) -> str:
    with pytest.raises(OptionError) as caught:
        read_options(AnimaInferenceOptions, [*base, *map(str, flags)])
    return "\n".join(caught.value.problems)


def test_every_option_of_the_reference_is_there_with_its_default():
    declared = {option.name: option for group in groups_of(AnimaInferenceOptions).values() for option in options_of(group)}
    assert len(REFERENCE) == 28
    assert {name: declared[name].default for name in REFERENCE} == REFERENCE
    assert all(declared[name].help for name in declared)
    assert read().attention.mode == "torch" and read("--lora_weight", "a", "b").loras.files == [("a", 1.0), ("b", 1.0)]


def test_the_samplers_are_those_that_exist():
    from library.sampling import flow_samplers

    assert tuple(flow_samplers.SAMPLERS) == SAMPLERS


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--from_file=a.txt"], "--prompt and --from_file are different sources"),
        (["--interactive"], "--prompt and --interactive are different sources"),
        (["--latent_path", "a.safetensors"], "--latent_path makes pictures of saved latents"),
        (["--save_path="], "--save_path is missing"),
        (["--image_size", 64], "--image_size has 1 numbers: give two, HEIGHT WIDTH"),
        (["--image_size", 64, 20000], "--image_size is 64 20000: give sides from 64 to 16384"),
        (["--infer_steps=0"], "--infer_steps is 0"),
        (["--infer_steps=1001"], "--infer_steps is 1001"),
        (["--seed=-1"], "--seed is -1"),
        (["--guidance_scale=-1"], "--guidance_scale is -1.0"),
        (["--flow_shift=0"], "--flow_shift is 0.0"),
        (["--images_per_prompt=0", "--batch_size=0"], "--images_per_prompt is 0"),
        (["--sampler=er_sd"], "--sampler is 'er_sd', but must be one of euler, er_sde (did you mean er_sde?)"),
        (["--vae_chunk_size=3"], "--vae_chunk_size is 3"),
        (["--lora_multiplier=1"], "--lora_multiplier needs --lora_weight"),
        (["--lora_weight", "a", "--lora_multiplier", 1, 2], "--lora_multiplier has 2 numbers, but --lora_weight has 1"),
        (["--include_patterns", "a"], "--include_patterns needs --lora_weight"),
        (["--lora_weight", "a", "--exclude_patterns", "("], "--exclude_patterns: the regular expression '(' is not valid"),
        (["--lycoris"], "--lycoris needs --lora_weight"),
        (["--device=cuda1"], "--device is 'cuda1'"),
        (["--blocks_to_swap=-1"], "--blocks_to_swap is -1"),
        (["--blocks_to_swap=2", "--offload"], "keep one"),
        (["--output_type=image"], "did you mean images?"),
        (["--atn_mode=torch"], "unknown flag --atn_mode (did you mean --attn_mode?)"),
    ],
)
def test_what_cannot_be_right(flags, words):
    assert words in problems(*flags)


def test_latents_are_not_decoded_into_latents():
    found = problems("--latent_path", "a", "--output_type=latent", base=["--save_path=out"])
    assert "--output_type=latent cannot be combined with --latent_path" in found


def test_what_is_needed_depends_on_what_is_done():
    assert read().parts == ("denoiser", "text", "vae")
    assert read("--output_type=latent").parts == ("denoiser", "text")
    options = read_options(AnimaInferenceOptions, ["--save_path=out", "--latent_path", "a", "--lora_weight", "b"])
    assert options.parts == ("vae",) and any("--lora_weight does nothing" in warning for warning in warnings_of(options))


def test_negative_strengths_and_lists():
    options = read("--lora_weight", "a", "b", "--lora_multiplier", "-0.5", "1", "--image_size", 832, 1216)
    assert options.loras.files == [("a", -0.5), ("b", 1.0)] and options.prompts.image_size == [832, 1216]


def test_fewer_strengths_than_files():
    options = read("--lora_weight", "a", "x/b.safetensors", "--lora_multiplier", 0.5)
    assert options.loras.files == [("a", 0.5), ("x/b.safetensors", 1.0)]
    assert list(warnings_of(options)) == ["--lora_multiplier says nothing of b.safetensors: merged with strength 1"]
    assert not list(warnings_of(read("--lora_weight", "a", "b")))


def test_fp8_says_that_it_is_the_scaled_kind():
    assert read("--fp8").compute.quantises and read("--fp8_scaled").compute.quantises and not read().compute.quantises
    assert any("--fp8_scaled" in warning for warning in warnings_of(read("--fp8")))
    assert not list(warnings_of(read("--fp8", "--fp8_scaled")))


def test_an_empty_prompt_is_given_and_beside_another_source_takes_one_back(tmp_path):
    save = ["--save_path=out"]
    assert read_options(AnimaInferenceOptions, [*save, "--prompt="]).prompts.prompt == ""
    assert read_options(AnimaInferenceOptions, [*save, "--prompt", ""]).prompts.prompt == ""
    assert "there is nothing to draw" in problems(base=save)
    (tmp_path / "my.toml").write_text('prompt = "a cat"\n')
    config = [*save, f"--config_file={tmp_path / 'my.toml'}", "--prompt="]
    assert read_options(AnimaInferenceOptions, [*config, "--interactive"]).prompts.interactive
    assert read_options(AnimaInferenceOptions, [*config, "--latent_path", "a.safetensors"]).output.latent_path
