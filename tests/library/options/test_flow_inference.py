"""What the options of sd3_minimal_inference.py and lumina_minimal_inference.py have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.declare import groups_of, options_of, warnings_of
from library.options.lumina_inference import LuminaInferenceOptions
from library.options.sd3_inference import Sd3InferenceOptions
from library.sampling.picture_plan import given_prompts, pictures_of
from tests.library.options.flow_inference_sets import MODEL_FLAGS, problems, read
from tests.library.options.reference import SPECS

SCRIPTS = {Sd3InferenceOptions: "sd3_minimal_inference", LuminaInferenceOptions: "lumina_minimal_inference"}
BOTH = tuple(MODEL_FLAGS)


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
@pytest.mark.parametrize(("kind", "count"), [(Sd3InferenceOptions, 21), (LuminaInferenceOptions, 27)])
def test_every_option_of_the_reference_is_there_with_its_default(kind, count):
    spec = json.loads((Path(str(SPECS)) / "cli" / f"{SCRIPTS[kind]}.json").read_text(encoding="utf-8"))
    reference = {option["dest"]: option["default"] for option in spec["options"]}
    declared = {option.name: option.default for group in groups_of(kind).values() for option in options_of(group)}
    assert len(reference) == count
    assert {name: declared[name] for name in reference} == {**reference, "lora_weights": None}  # theirs is an empty list


@pytest.mark.parametrize("kind", BOTH)
def test_every_option_explains_itself(kind):
    for group in groups_of(kind).values():
        for option in options_of(group):
            assert len(option.help) > 8 and option.help.isascii() and not option.help.endswith("."), option.name


@pytest.mark.parametrize("kind", BOTH)
def test_the_usual_prompt_stands_in_for_all_others(kind):
    for flags in (["--from_file=p.txt"], ["--interactive"], ["--latent_path", "x"], ["--prompt="], []):
        assert read(kind, *flags)
    assert "--prompt and --from_file are different sources" in problems(kind, "--prompt=a", "--from_file=p.txt")[0]
    assert "--latent_path makes pictures of saved latents" in problems(kind, "--latent_path", "x", "--prompt=a")[0]
    with pytest.raises(OptionError, match=f"{MODEL_FLAGS[kind]} is missing: name the model"):
        read_options(kind, [])


@pytest.mark.parametrize("kind", BOTH)
def test_files_and_their_strengths(kind):
    options = read(kind, "--lora_weights", "a.safetensors;0.8", "b.safetensors", "--merge_lora_weights")
    assert options.loras.files == [("a.safetensors", 0.8), ("b.safetensors", 1.0)] and not options.loras.lycoris
    assert list(warnings_of(options)) == [] and options.loras.merged and not read(kind).loras.merged
    (warning,) = warnings_of(read(kind, "--merge_lora_weights"))
    assert warning == "--merge_lora_weights does nothing without --lora_weights"


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--steps=0", "--steps is 0: give 1 to 1000"),
        ("--steps=1001", "--steps is 1001"),
        ("--seed=-1", "--seed is -1"),
        ("--sampler=ddim", "--sampler is 'ddim', but must be one of euler, er_sde"),
        ("--device=cuda1", "--device is 'cuda1': give cpu, cuda, cuda:1"),
        ("--images_per_prompt=0", "--images_per_prompt is 0"),
        ("--output_dir=", "--output_dir is missing"),
        ("--infer_steps=20", "unknown flag --infer_steps (did you mean --steps?)"),
        ("--lora_weight=x", "unknown flag --lora_weight (did you mean --lora_weights?)"),
        ("--save_path=x", "unknown flag --save_path (did you mean --output_dir?)"),
    ],
)
def test_refused(kind, flag, words):
    assert words in problems(kind, flag)[0]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (Sd3InferenceOptions, ["--width=832", "--height=1216", "--cfg_scale=4", "--flow_shift=2"]),
        (LuminaInferenceOptions, ["--image_width=832", "--image_height=1216", "--guidance_scale=4", "--discrete_flow_shift=2"]),
    ],
)
def test_a_picture_is_planned_from_them(kind, flags):
    options = read(kind, *flags, "--steps=7", "--seed=3", "--sampler=er_sde", "--images_per_prompt=2", "--prompt=a cat").prompts
    (prompt,) = given_prompts(options, ("euler", "er_sde"))
    first, second = pictures_of(prompt, options, side_step=16)
    assert (first.width, first.height, first.steps, first.scale, first.shift) == (832, 1216, 7, 4.0, 2.0)
    assert (first.sampler, first.seed, second.seed, first.prompt) == ("er_sde", 3, 4, "a cat")
