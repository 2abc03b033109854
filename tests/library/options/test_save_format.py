"""What --save_format cannot be combined with, before anything is read."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options

REQUIRED = ("--pretrained_model_name_or_path=dit.safetensors", "--qwen3=qwen3.safetensors", "--vae=vae.safetensors",
            "--dataset_config=my.toml", "--output_dir=out")  # fmt: skip
OURS = "--network_module=networks.lora_anima"


@pytest.mark.parametrize(
    "arguments",
    [
        (OURS, "--save_format=comfy"),
        (OURS, "--save_format=diffusers", "--network_train_unet_only"),
        (OURS, "--save_format=diffusers", "--cache_text_encoder_outputs"),
        (OURS, "--save_format=diffusers", "--text_encoder_lr", "0"),
        ("--network_module=lycoris.kohya",),
    ],
)
def test_what_goes(arguments):
    options = read_options(AnimaTrainOptions, [*REQUIRED, *arguments])
    assert f"--save_format={options.saving.save_format}" in (*arguments, "--save_format=None")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--network_module=lycoris.kohya", "--save_format=comfy"),
            "--save_format=comfy needs --network_module=networks.lora_anima: lycoris.kohya names what is in its files itself",
        ),
        ((OURS, "--save_format=diffusers"), "cannot hold a text encoder's LoRA, .* add --network_train_unet_only"),
        ((OURS, "--save_format=kohya"), "--save_format is 'kohya', but must be one of comfy, diffusers"),
    ],
)
def test_what_does_not(arguments, said):
    with pytest.raises(OptionError, match=said):
        read_options(AnimaTrainOptions, [*REQUIRED, *arguments])
