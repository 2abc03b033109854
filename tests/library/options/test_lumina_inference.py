"""The options that lumina_minimal_inference.py has alone; what it shares is in test_flow_inference.py."""

from __future__ import annotations

import pytest

from library.options.declare import warnings_of
from library.options.lumina_inference import LuminaInferenceOptions
from tests.library.options.flow_inference_sets import problems, read

GUIDE = ["--gemma2_path=gemma.safetensors", "--ae_path=ae.safetensors", "--output_dir=pictures", "--offload", "--seed=1234",
         "--prompt=a cat", "--negative_prompt=blurry", "--system_prompt=You are an artist.", "--lora_weights", "my.safetensors;1.0",
         "--add_system_prompt_to_negative_prompt"]  # fmt: skip


def test_command_of_the_guide():
    options = read(LuminaInferenceOptions, *GUIDE)
    assert (options.files.gemma2_path, options.files.ae_path) == ("gemma.safetensors", "ae.safetensors")
    assert options.loras.files == [("my.safetensors", 1.0)] and options.compute.offload and options.output.folder == "pictures"
    assert options.prompts.system_prompt == "You are an artist." and options.prompts.add_system_prompt_to_negative_prompt
    assert list(warnings_of(options)) == []


def test_what_is_not_said():
    prompts = read(LuminaInferenceOptions).prompts
    assert (prompts.infer_steps, prompts.guidance_scale, prompts.image_size, prompts.seed) == (36, 3.5, [1024, 1024], None)
    assert (prompts.flow_shift, prompts.cfg_trunc_ratio, prompts.renorm_cfg) == (6.0, 0.25, 1.0)


def test_number_formats():
    compute = read(LuminaInferenceOptions).compute
    assert (compute.precision, compute.text_precision, compute.vae_precision) == ("bf16", "bf16", "bf16")
    compute = read(LuminaInferenceOptions, "--dtype=float16", "--gemma2_dtype=fp32", "--ae_dtype=float32").compute
    assert (compute.precision, compute.text_precision, compute.vae_precision) == ("fp16", "no", "no")


@pytest.mark.parametrize(
    ("flags", "mode"), [([], "torch"), (["--use_flash_attn"], "flash"), (["--use_sage_attn"], "sageattn"), (["--sdpa"], "torch")]
)
def test_kernels_may_draw_that_cannot_train(flags, mode):
    assert read(LuminaInferenceOptions, *flags).attention.mode == mode


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype=int8"], "--dtype is 'int8': give bf16, fp16 or fp32"),
        (["--gemma2_dtype=fp8"], "--gemma2_dtype is 'fp8'"),
        (["--ae_dtype=x"], "--ae_dtype is 'x'"),
        (["--gemma2_max_token_length=5000"], "--gemma2_max_token_length is 5000: give 1 to 4096 tokens"),
        (["--cfg_trunc_ratio=-0.5"], "--cfg_trunc_ratio is -0.5: give 0 or more"),
        (["--renorm_cfg=-1"], "--renorm_cfg is -1.0: give 0 or more"),
        (["--discrete_flow_shift=0"], "--discrete_flow_shift is 0.0: give a number above 0"),
        (["--image_width=16"], "--image_width is 16: give 64 to 16384 pixels"),
        (["--use_flash_attn", "--use_sage_attn"], "--use_flash_attn and --use_sage_attn each name a kernel"),
        (["--vae=x"], "unknown flag --vae (did you mean --ae_path?)"),
        (["--gemma2=x"], "unknown flag --gemma2 (did you mean --gemma2_path?)"),
        (["--cfg_scale=3"], "unknown flag --cfg_scale (did you mean --guidance_scale?)"),
        (["--flow_shift=3"], "unknown flag --flow_shift (did you mean --discrete_flow_shift?)"),
        (["--ckpt_path=x"], "(did you mean --pretrained_model_name_or_path?)"),
    ],
)
def test_refused(flags, words):
    (problem,) = problems(LuminaInferenceOptions, *flags)
    assert words in problem


def test_the_negative_prompt_s_switch_needs_a_system_prompt():
    (warning,) = warnings_of(read(LuminaInferenceOptions, "--add_system_prompt_to_negative_prompt"))
    assert warning == "--add_system_prompt_to_negative_prompt does nothing without --system_prompt"
