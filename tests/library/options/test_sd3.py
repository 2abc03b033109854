"""The rules of sd3_train_network.py's own options; what they share with Lumina's is in test_flow_train.py."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.declare import warnings_of
from library.options.sd3 import Sd3TrainOptions

REQUIRED = ("--pretrained_model_name_or_path=sd3.safetensors", "--dataset_config=my.toml", "--output_dir=out")
OURS = "--network_module=networks.lora_sd3"
T5 = "--network_args train_t5xxl=true"
GUIDE = """--pretrained_model_name_or_path=sd3.5_medium.safetensors --clip_l=clip_l.safetensors --clip_g=clip_g.safetensors
    --t5xxl=t5xxl.safetensors --dataset_config=my.toml --output_dir=out --output_name=my_sd3_lora --save_model_as=safetensors
    --network_module=networks.lora --network_dim=32 --network_alpha=16 --learning_rate=1e-4 --optimizer_type=AdamW8bit
    --lr_scheduler=constant --sdpa --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=fp16 --gradient_checkpointing
    --weighting_scheme=uniform --blocks_to_swap=32 --apply_lg_attn_mask --apply_t5_attn_mask --t5xxl_max_token_length=154
    --pos_emb_random_crop_rate=0.1 --enable_scaled_pos_embed --training_shift=1.5 --clip_l_dropout_rate=0.1"""


def read(arguments: str = "", *, module: str = OURS) -> Sd3TrainOptions:
    return read_options(Sd3TrainOptions, [*REQUIRED, module, *arguments.split()])


def problems(arguments: str, *, module: str = OURS) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read(arguments, module=module)
    return caught.value.problems


def test_command_of_the_guide():
    options = read_options(Sd3TrainOptions, GUIDE.split())
    assert (options.sd3.clip_l, options.sd3.clip_g, options.sd3.t5xxl) == tuple(
        f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl")
    )
    assert (options.sd3.t5xxl_max_token_length, options.flow.training_shift, options.memory.blocks_to_swap) == (154, 1.5, 32)
    assert options.sd3.apply_lg_attn_mask and options.sd3.apply_t5_attn_mask and options.sd3.enable_scaled_pos_embed
    assert list(warnings_of(options)) == []


# arguments -> the rates of CLIP-L, CLIP-G and T5; 0 = no LoRA
RATES = [
    ("", (2e-6, 2e-6, 0)),
    ("--learning_rate=1e-4", (1e-4, 1e-4, 0)),
    (f"--learning_rate=1e-4 {T5}", (1e-4, 1e-4, 1e-4)),
    ("--text_encoder_lr 1e-5", (1e-5, 1e-5, 0)),
    (f"--text_encoder_lr 1e-5 {T5}", (1e-5, 1e-5, 1e-5)),
    (f"--text_encoder_lr 1e-5 2e-5 {T5}", (1e-5, 2e-5, 2e-5)),
    (f"--text_encoder_lr 1e-5 2e-5 3e-5 {T5}", (1e-5, 2e-5, 3e-5)),
    (f"--text_encoder_lr 0 0 3e-5 {T5}", (0, 0, 3e-5)),
    ("--network_args train_t5xxl=True rank_dropout=0.1", (2e-6, 2e-6, 2e-6)),
    ("--network_args train_t5xxl=false", (2e-6, 2e-6, 0)),
    ("--cache_text_encoder_outputs", (2e-6, 2e-6, 0)),
    ("--cache_text_encoder_outputs_to_disk --text_encoder_lr 1e-5 0", (1e-5, 0, 0)),
    ("--cache_text_encoder_outputs --text_encoder_lr 0", (0, 0, 0)),
    ("--cache_text_encoder_outputs --network_train_text_encoder_only", (2e-6, 2e-6, 0)),
    (f"--cache_text_encoder_outputs --text_encoder_lr 1e-5 1e-5 0 {T5}", (1e-5, 1e-5, 0)),
    ("--network_train_unet_only --text_encoder_lr 1e-5", (0, 0, 0)),
    ("--network_train_unet_only --cache_text_encoder_outputs", (0, 0, 0)),
]


@pytest.mark.parametrize(("arguments", "expected"), RATES, ids=[arguments for arguments, _ in RATES])
def test_rates_of_the_text_encoders(arguments, expected):
    options = read(arguments)
    assert options.text_rates == expected
    assert options.trains_text_encoder is any(expected) and options.trains_t5 is bool(expected[2])


REFUSED = [
    (
        f"--cache_text_encoder_outputs {T5}",
        "--network_args train_t5xxl=true cannot be combined with --cache_text_encoder_outputs: a T5 that is trained must run",
    ),
    (
        f"--cache_text_encoder_outputs_to_disk --text_encoder_lr 1e-5 {T5}",
        "train_t5xxl=true cannot be combined with --cache_text_encoder_outputs_to_disk",
    ),
    (
        "--network_train_text_encoder_only --cache_text_encoder_outputs --text_encoder_lr 0",
        "--network_train_text_encoder_only with --text_encoder_lr 0 0 0 leaves nothing to train",
    ),
    ("--unet_lr=0 --text_encoder_lr 0 0 1e-4", "--unet_lr is 0, so that the denoiser is not trained, and no text encoder is"),
    ("--t5xxl_max_token_length=0", "--t5xxl_max_token_length is 0: give 1 or more"),
    ("--clip_l_dropout_rate=1.5", "--clip_l_dropout_rate is 1.5: give a number from 0 to 1"),
    ("--clip_g_dropout_rate=-0.1", "--clip_g_dropout_rate is -0.1"),
    ("--t5_dropout_rate=2", "--t5_dropout_rate is 2.0"),
    ("--pos_emb_random_crop_rate=1.1", "--pos_emb_random_crop_rate is 1.1: give a number from 0 to 1"),
    ("--t5xxl_device=gpu", "--t5xxl_device is 'gpu': give cpu, cuda, cuda:1 (the second GPU), mps or xpu"),
    ("--t5xxl_dtype=int8", "--t5xxl_dtype is 'int8': give float16, bfloat16, float32 or fp8"),
    ("--t5xxl_dtype=fp8", "--t5xxl_dtype=fp8 needs --mixed_precision=bf16 or fp16, not no"),
    (f"--t5xxl_device=cpu {T5}", "--t5xxl_device=cpu cannot be combined with --network_args train_t5xxl=true"),
    ("--training_shift=0", "--training_shift is 0.0"),
    (f"--save_format=diffusers {T5}", "--save_format=diffusers cannot hold the T5's LoRA"),
    ("--clip_skip=1", "SD3's CLIPs take 75 tokens of a caption without weights and give their last layer but one"),
    (
        "--discrete_flow_shift=3",
        "unknown flag --discrete_flow_shift: it belongs to lumina_train_network.py and anima_train_network.py",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_refused(arguments, expected):
    assert any(expected in problem for problem in problems(arguments))


WARNED = [
    ("--save_clip", "--save_clip does nothing: training a LoRA leaves CLIP-L and CLIP-G as they are"),
    ("--save_t5xxl", "--save_t5xxl does nothing: training a LoRA leaves T5-XXL as"),
    (f"--network_train_unet_only {T5}", "--network_args train_t5xxl=true does nothing with --network_train_unet_only"),
    ("--text_encoder_lr 1e-5 1e-5 1e-5", "the third rate, 1e-05, does nothing without --network_args train_t5xxl=true"),
    (f"--t5xxl_device=cpu --text_encoder_lr 1e-5 1e-5 0 {T5}", "--text_encoder_lr: the third rate is 0: the T5 gets no LoRA"),
    ("--text_encoder_lr 1e-5 1e-5 0 1e-5", "--text_encoder_lr: SD3 has 3 text encoders: only the first 3 rates count, 1e-05 1e-05 0"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), WARNED, ids=[arguments for arguments, _ in WARNED])
def test_warned(arguments, expected):
    (warning,) = warnings_of(read(arguments))
    assert expected in warning


@pytest.mark.parametrize(
    "arguments",
    ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs --text_encoder_lr 1e-5", "--text_encoder_lr 1e-5 1e-5 0",
     "--network_train_unet_only --cache_text_encoder_outputs", "--t5xxl_device=cuda:1 --t5xxl_dtype=bf16",
     "--pos_emb_random_crop_rate=1 --enable_scaled_pos_embed"],
)  # fmt: skip
def test_allowed_without_a_warning(arguments):
    assert list(warnings_of(read(arguments))) == []


@pytest.mark.parametrize(
    ("given", "torch_s"),
    [(None, None), ("float16", "float16"), ("fp16", "float16"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16"),
     ("float", "float32"), ("fp32", "float32"), ("float32", "float32"), ("fp8", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e4m3fn")],
)  # fmt: skip
def test_number_formats_of_the_t5(given, torch_s):
    sd3 = read(f"--mixed_precision=bf16 --t5xxl_dtype={given or ''}").sd3
    assert sd3.t5_dtype == torch_s and sd3.t5_fp8 is (torch_s == "float8_e4m3fn")


@pytest.mark.parametrize("module", ["networks.lora_sd3", "networks.lora"])
def test_two_network_modules_are_as_good(module):
    assert read("--save_format=diffusers", module=f"--network_module={module}").saving.save_format == "diffusers"


def test_other_network_modules_have_formats_of_their_own():
    (problem,) = problems("--save_format=comfy", module="--network_module=lycoris.kohya")
    assert problem.startswith(
        "--save_format=comfy needs --network_module=networks.lora_sd3 or networks.lora: lycoris.kohya names"
    )
