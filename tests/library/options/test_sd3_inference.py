"""The options that sd3_minimal_inference.py has alone; what it shares is in test_flow_inference.py."""

from __future__ import annotations

import pytest

from library.options.sd3_inference import Sd3InferenceOptions
from tests.library.options.flow_inference_sets import problems, read

# as in the reference, and the shift that it has built in
DEFAULTS = {"steps": 50, "cfg_scale": 5.0, "seed": 1, "width": 1024, "height": 1024, "flow_shift": 3.0}


def test_what_is_not_said():
    options = read(Sd3InferenceOptions)
    assert {name: getattr(options.prompts, name) for name in DEFAULTS} == DEFAULTS
    assert options.prompts.prompt == "A photo of a cat" and options.output.folder == "."
    assert options.prompts.cfg_trunc_ratio is options.prompts.renorm_cfg is options.compute.precision is None
    assert read(Sd3InferenceOptions, "--seed=").prompts.seed is None


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        (["--fp16"], "fp16"),
        (["--bf16"], "bf16"),
        (["--mixed_precision=no"], "no"),
        (["--bf16", "--mixed_precision=bf16"], "bf16"),
    ],
)
def test_number_formats(flags, precision):
    assert read(Sd3InferenceOptions, *flags).compute.precision == precision


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fp16", "--bf16"], "--fp16 and --bf16 name different number formats: keep one of them"),
        (["--fp16", "--mixed_precision=bf16"], "--fp16 and --mixed_precision=bf16 name different number formats"),
        (["--t5xxl_token_length=0"], "--t5xxl_token_length is 0: give 1 or more"),
        (["--cfg_scale=-1"], "--cfg_scale is -1.0: give 0 or more"),
        (["--flow_shift=0"], "--flow_shift is 0.0"),
        (["--width=16"], "--width is 16: give 64 to 16384 pixels"),
        (["--height=20000"], "--height is 20000"),
        (["--guidance_scale=7"], "unknown flag --guidance_scale (did you mean --cfg_scale?)"),
        (["--t5xxl_max_token_length=77"], "(did you mean --t5xxl_token_length?)"),
        (["--H=512"], "(did you mean --height?)"),
        (["--pretrained_model_name_or_path=x"], "(did you mean --ckpt_path?)"),
    ],
)
def test_refused(flags, words):
    (problem,) = problems(Sd3InferenceOptions, *flags)
    assert words in problem
