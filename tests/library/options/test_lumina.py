"""The rules of lumina_train_network.py's own options; what they share with SD3's is in test_flow_train.py."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.declare import warnings_of
from library.options.lumina import LuminaTrainOptions

REQUIRED = ("--pretrained_model_name_or_path=lumina2.safetensors", "--dataset_config=my.toml", "--output_dir=out",
            "--network_module=networks.lora_lumina")  # fmt: skip
GUIDE = """--pretrained_model_name_or_path=lumina-image-2.safetensors --gemma2=gemma-2-2b.safetensors --ae=ae.safetensors
    --dataset_config=my.toml --output_dir=out --output_name=my_lora --save_model_as=safetensors --network_module=networks.lora_lumina
    --network_dim=8 --network_alpha=8 --learning_rate=1e-4 --optimizer_type=AdamW --lr_scheduler=constant
    --timestep_sampling=nextdit_shift --discrete_flow_shift=6.0 --model_prediction_type=raw
    --system_prompt=You_are_an_assistant --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=bf16
    --gradient_checkpointing --cache_latents --cache_text_encoder_outputs --network_train_unet_only --gemma2_max_token_length=300 --sample_batch_size=4"""


def read(arguments: str = "") -> LuminaTrainOptions:
    return read_options(LuminaTrainOptions, [*REQUIRED, *arguments.split()])


def problems(arguments: str) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read(arguments)
    return caught.value.problems


def test_command_of_the_guide():
    options = read_options(LuminaTrainOptions, GUIDE.split())
    assert (options.lumina.gemma2, options.lumina.ae) == ("gemma-2-2b.safetensors", "ae.safetensors")
    assert (options.lumina.system_prompt, options.lumina.tokens) == ("You_are_an_assistant", 300)
    assert options.pictures_at_once == 4 and options.flow.timestep_sampling == "nextdit_shift"
    assert list(warnings_of(options)) == []


def test_what_is_not_said():
    options = read()
    assert (options.lumina.tokens, options.pictures_at_once, options.attention.mode) == (256, 1, "torch")
    assert (options.flow.timestep_sampling, options.flow.discrete_flow_shift) == ("shift", 6.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", True), ("--text_encoder_lr 1e-5", True), ("--network_train_unet_only", False), ("--cache_text_encoder_outputs", False)],
)
def test_gemma_is_trained_unless_it_is_switched_off_or_cached(arguments, expected):
    assert read(arguments).trains_text_encoder is expected


@pytest.mark.parametrize(
    ("arguments", "mode", "flag"),
    [
        ("--use_flash_attn", "flash", "--use_flash_attn"),
        ("--use_flash_attn --attn_mode=flash", "flash", "--attn_mode=flash"),
        ("--attn_mode=xformers", "xformers", "--attn_mode=xformers"),
        ("--xformers", "xformers", "--xformers"),
        ("--sdpa", "torch", "--attn_mode=torch"),
    ],
)
def test_flags_that_name_a_kernel(arguments, mode, flag):
    attention = read(arguments).attention
    assert (attention.mode, attention.flag) == (mode, flag)


@pytest.mark.parametrize(
    ("arguments", "depends"), [("nextdit_shift", True), ("flux_shift", True), ("shift", False), ("sigma", False)]
)
def test_noise_levels_that_depend_on_the_sizes_need_a_dataset(arguments, depends):
    assert read(f"--show_timesteps --timestep_sampling={arguments}").needs_dataset is depends


REFUSED = [
    ("--use_sage_attn", "--use_sage_attn cannot train: the kernel has no backward pass; drop --use_sage_attn, and keep sageattn for"),
    ("--use_sage_attn --attn_mode=torch", "--use_sage_attn and --attn_mode=torch each name a kernel: keep one of them"),
    ("--use_flash_attn --attn_mode=xformers", "--use_flash_attn and --attn_mode=xformers each name a kernel"),
    ("--use_flash_attn --use_sage_attn", "--use_flash_attn and --use_sage_attn each name a kernel: keep one of them"),
    ("--vae=v.safetensors", "--vae=v.safetensors cannot be used: here the image coder is named by --ae; write --ae=v.safetensors"),
    ("--vae=v --ae=a", "--vae=v and --ae=a name two image coders: keep --ae"),
    ("--gemma2_max_token_length=0", "--gemma2_max_token_length is 0: give 1 to 4096 tokens"),
    ("--gemma2_max_token_length=4097", "--gemma2_max_token_length is 4097"),
    ("--sample_batch_size=0", "--sample_batch_size is 0: give 1 or more"),
    ("--discrete_flow_shift=0", "--discrete_flow_shift is 0.0"),
    ("--timestep_sampling=next", "--timestep_sampling is 'next', but must be one of sigma, uniform, sigmoid, shift, nextdit_shift"),
    (
        "--text_encoder_lr 1e-5 --cache_text_encoder_outputs",
        "--text_encoder_lr 1e-05 cannot be combined with --cache_text_encoder_outputs: a text encoder that is trained must run",
    ),
    ("--save_format=diffusers", "--save_format=diffusers cannot hold a text encoder's LoRA, which diffusers does not load for Lumina"),
    ("--network_module=networks.lora --save_format=comfy", "--save_format=comfy needs --network_module=networks.lora_lumina: "),
    ("--weighted_captions", "and Lumina Image 2.0 has Gemma 2; drop it"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_refused(arguments, expected):
    (problem,) = problems(arguments)
    assert expected in problem


WARNED = [
    (
        "--cache_text_encoder_outputs",
        "a text encoder whose outputs are cached is not trained, only the denoiser is; add --network",
    ),
    ("--use_flash_attn --sdpa", "--sdpa does nothing: attention is computed by flash"),
    (
        "--text_encoder_lr 1e-5 1e-6",
        "--text_encoder_lr: Lumina Image 2.0 has one text encoder: only the first rate counts, 1e-05",
    ),
    ("--huggingface_token=hf_x --gemma2_tokenizer=./folder", "--huggingface_token does nothing without"),
    ("--model_prediction_type=additive", "--model_prediction_type=additive trains as raw does"),
    ("--weighting_scheme=cosmap", "--weighting_scheme=cosmap does nothing with --model_prediction_type=raw"),
]


@pytest.mark.parametrize(("arguments", "expected"), WARNED, ids=[arguments for arguments, _ in WARNED])
def test_warned(arguments, expected):
    (warning,) = warnings_of(read(arguments))
    assert expected in warning


@pytest.mark.parametrize(
    "arguments",
    ["--vae=a --ae=a", "--huggingface_token=hf_x", "--huggingface_token=hf_x --gemma2_tokenizer=google/gemma-2-2b",
     "--save_format=diffusers --network_train_unet_only", "--save_format=comfy --cache_text_encoder_outputs --text_encoder_lr 0"],
)  # fmt: skip
def test_allowed_without_a_warning(arguments):
    assert list(warnings_of(read(arguments))) == []
