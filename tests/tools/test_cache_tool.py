"""Which architecture a caching tool works for, and what it asks of a command line."""

from __future__ import annotations

import dataclasses

import pytest

from library.errors import OptionError
from library.files.model_path import ANIMA_DIT, LUMINA, SD1, SD2, SD3, SDXL, described, with_article
from library.options.anima import AnimaTrainOptions
from library.options.cache_tool import CacheToolOptions, read_cache_tool_options
from library.options.declare import groups_of, options_of
from tools.cache_tool import ARCHITECTURES, DEFAULT, chosen_architecture, with_switches

DATA = ["--anima", "--train_data_dir=pictures", "--resolution=64"]


def read(part: str, *flags: str):
    return read_cache_tool_options(AnimaTrainOptions, part, [*DATA, *flags])


def test_each_architecture_but_the_default_has_a_switch():
    switches = {option.name for option in options_of(CacheToolOptions) if option.is_switch} - {"skip_existing"}
    assert switches == set(ARCHITECTURES) - {DEFAULT}


def test_the_switch_chooses():
    for name in ("anima", "lumina", "sd3", "sdxl"):
        assert chosen_architecture(["--vae", "x", f"--{name}"]).architecture.name == name
        assert chosen_architecture([f"--{name}=true"]).architecture.name == name
    for arguments in ([], ["--vae=anima"], ["--anima=false"], ["--v2"], ["--help"], ["-h"]):
        assert chosen_architecture(arguments).architecture.name == "sd"


@pytest.mark.parametrize("arguments, message", [
    (["--flux", "--anima"], "--flux: there is no caching for FLUX here yet; there is: --sdxl, --sd3, --lumina or --anima, and without"),
    (["--sd3", "--lumina"], "--sd3 and --lumina are given together: choose one"),
    (["--lumi"], "--lumina is to be written in full"),
    (["--sdxl", "--anima"], "--sdxl and --anima are given together: choose one"),
])  # fmt: skip
def test_architectures_that_are_not_here(arguments, message):
    with pytest.raises(OptionError, match=message):
        chosen_architecture(arguments)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_stable_diffusion_takes_the_command_of_its_training(name):
    """Also where the text encoders are trained, which needs no cache of texts: the tool is asked for one."""
    flags = ["--train_data_dir=pictures", "--resolution=64", "--pretrained_model_name_or_path=x", "--network_module=networks.lora",
             "--text_encoder_lr=1e-5", "--output_dir=o", *(["--sdxl"] if name == "sdxl" else ["--v2", "--clip_skip=2"])]  # fmt: skip
    for part in ("vae", "text"):
        options = read_cache_tool_options(ARCHITECTURES[name].options, part, flags)
        assert options.parts == (part,) and options.clip.v2 == (name == "sd")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (
            "sd3",
            ["--clip_l=l", "--clip_g=g", "--t5xxl=t", "--network_module=networks.lora", "--network_args", "train_t5xxl=true"],
        ),
        ("lumina", ["--gemma2=g", "--ae=a", "--network_module=networks.lora_lumina", "--text_encoder_lr=1e-5"]),
    ],
)
def test_models_of_several_files_take_the_command_of_their_training_or_their_files_alone(name, flags):
    data = [f"--{name}", "--train_data_dir=pictures", "--resolution=64"]
    for part in ("vae", "text"):
        for given in ([], [*flags, "--pretrained_model_name_or_path=x", "--output_dir=o"]):
            options = read_cache_tool_options(ARCHITECTURES[name].options, part, [*data, *given])
            assert options.parts == (part,)


@pytest.mark.parametrize(
    "part, own, other", [("vae", "latents", "text_encoder_outputs"), ("text", "text_encoder_outputs", "latents")]
)
def test_its_own_cache_is_implied_and_the_other_one_is_left_alone(part, own, other):
    needed = {"vae": "--vae=v", "text": "--qwen3=q"}[part]
    for flags in ((), (f"--cache_{own}_to_disk=false", f"--cache_{other}_to_disk", f"--cache_{other}")):
        caches = read(part, needed, *flags).caches
        assert getattr(caches, f"cache_{own}_to_disk") and not getattr(caches, f"cache_{other}_to_disk")
        assert (caches.latents_cached, caches.text_cached) == (part == "vae", part == "text")


def test_what_only_training_needs_may_be_missing_and_the_part_s_own_file_may_not():
    assert read("vae", "--vae=v").parts == ("vae",)
    assert read("text", "--qwen3=q").parts == ("text",)
    with pytest.raises(OptionError) as caught:
        read("vae")
    assert caught.value.problems == ("--vae is missing: name the file of the Qwen-Image VAE",)
    with pytest.raises(OptionError) as caught:
        read("text", "--text_encoder_lr", "1e-5")
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith("--qwen3 is missing")
    assert read("vae", "--show_captions=1").parts == ()


def test_all_options_of_training_are_taken():
    values = [f"{option.flag}=1" for group in ("network", "optimizer") for option in options_of(groups_of(AnimaTrainOptions)[group])
              if option.name in ("network_dim", "learning_rate")]  # fmt: skip
    options = read("vae", "--vae=v", "--network_module=networks.lora_anima", "--output_dir=o", "--max_train_epochs=4", *values)
    assert options.run.max_train_epochs == 4 and options.network.network_dim == 1
    mine = {option.name for group in groups_of(type(options)).values() for option in options_of(group)}
    training = {option.name for group in groups_of(AnimaTrainOptions).values() for option in options_of(group)}
    assert mine - training == {field.name for field in dataclasses.fields(CacheToolOptions)}


def test_skip_existing_trusts_the_files():
    assert not read("vae", "--vae=v").caches.skip_cache_check
    assert read("vae", "--vae=v", "--skip_existing").caches.skip_cache_check
    assert read("vae", "--vae=v", "--skip_cache_check").caches.skip_cache_check


def test_variants_need_no_flag_of_the_cache():
    assert read("text", "--qwen3=q", "--caption_variants=3").caches.caption_variants == 3


@pytest.mark.parametrize(
    ("given", "found", "advice"),
    [
        ("sd", SDXL, "add --sdxl"),
        ("sd", SD2, "add --v2"),
        ("sd", ANIMA_DIT, "add --anima"),
        ("sdxl", SD1, "drop --sdxl"),
        ("sdxl", SD2, "drop --sdxl and add --v2"),
        ("anima", SDXL, "drop --anima and add --sdxl"),
        ("sd", SD3, "add --sd3"),
        ("sd3", LUMINA, "drop --sd3 and add --lumina"),
        ("lumina", SD3, "drop --lumina and add --sd3"),
    ],
)
def test_a_model_of_another_kind_needs_another_switch(given, found, advice):
    message = f"x.safetensors is {described(found)}, not another"
    assert with_switches(message, ARCHITECTURES[given]) == f"x.safetensors is {with_article(found)} ({advice}), not another"
