"""The words of a command line."""

import pytest

from library.options.anima import AnimaTrainOptions
from library.options.arguments import read_arguments, wants_help
from library.options.declare import groups_of, options_of
from library.options.given import known_options

KNOWN = known_options(options_of(group) for group in groups_of(AnimaTrainOptions).values())


def read(*arguments):
    return read_arguments(arguments, KNOWN)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--network_dim", "8"], {"network_dim": 8}),
        (["--network_dim=8"], {"network_dim": 8}),
        (["--network_dim=8", "--network_dim=16"], {"network_dim": 16}),
        (["--adaptive_noise_scale", "-0.5"], {"adaptive_noise_scale": -0.5}),
        (["--cache_latents"], {"cache_latents": True}),
        (["--cache_latents=false"], {"cache_latents": False}),
        (["--cache_latents=True"], {"cache_latents": True}),
        (["--network_args", "a=1", "b=--c d", "--seed=1"], {"network_args": ["a=1", "b=--c d"], "seed": 1}),
        (["--network_args=a=1", "b=2"], {"network_args": ["a=1", "b=2"]}),
        (["--network_args"], {"network_args": None}),
        (["--text_encoder_lr", "1e-4", "2e-5"], {"text_encoder_lr": [1e-4, 2e-5]}),
        (["--vae="], {"vae": None}),
        (["--vae", ""], {"vae": None}),
        (["--output_name=a=b c"], {"output_name": "a=b c"}),
        (["--output_name", "-x"], {"output_name": "-x"}),
        (["--training_comment", "--not a flag"], {"training_comment": "--not a flag"}),
        (["--vae", r"C:\models\my vae.safetensors"], {"vae": r"C:\models\my vae.safetensors"}),
        (["--metadata_title", "zwei\nZeilen \u4e2d"], {"metadata_title": "zwei\nZeilen \u4e2d"}),
        (["--lr_warmup_steps=10%"], {"lr_warmup_steps": 0.1}),
    ],
)
def test_read(arguments, expected):
    given = read(*arguments)
    assert given.problems == [] and given.values == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--networkdim=4"], ["unknown flag --networkdim (did you mean --network_dim?)"]),
        (["--network-dim", "4"], ["unknown flag --network-dim (did you mean --network_dim?)"]),
        (["-network_dim", "4"], ["unknown flag -network_dim (did you mean --network_dim?)"]),
        (["\u2014network_dim=4"], ["unknown flag \u2014network_dim (did you mean --network_dim?)"]),
        (["-pretrained=x"], ["unknown flag -pretrained (did you mean --pretrained_model_name_or_path?)"]),
        (["--sample_every", "5", "6"],
         ["--sample_every may be short for --sample_every_n_steps, --sample_every_n_epochs: write it in full"]),
        (["--train_batch=x"], ["--train_batch_size is 'x', but must be a whole number"]),
        (["--zzzz"], ["unknown flag --zzzz: --help lists all flags"]),
        (["--zzzz", "1", "2", "--qqqq=3"], ["unknown flag --zzzz: --help lists all flags", "unknown flag --qqqq: --help lists all flags"]),
        (["x", "--seed=1", "y"], ["stray argument 'x': it belongs to no flag; quote values that hold blanks",
                                  "stray argument 'y': it belongs to no flag; quote values that hold blanks"]),
        (["--cache_latents", "true"], ["stray argument 'true' after --cache_latents: write --cache_latents=true"]),
        (["--cache_latents=yes"], ["--cache_latents is 'yes', but must be true or false: --cache_latents alone means true"]),
        (["--seed", "--vae=x"], ["--seed needs a value: a whole number"]),
        (["--seed"], ["--seed needs a value: a whole number"]),
        (["--seed=x", "--huber_c=y"], ["--seed is 'x', but must be a whole number", "--huber_c is 'y', but must be a number"]),
        (["--mixed_precision=bf61"], ["--mixed_precision is 'bf61', but must be one of no, fp16, bf16 (did you mean bf16?)"]),
        (["--mixed_precision=FP16"], ["--mixed_precision is 'FP16', but must be one of no, fp16, bf16 (did you mean fp16?)"]),
        (["--text_encoder_lr", "1", "a"], ["--text_encoder_lr is ['1', 'a'], but must be a list, each a number"]),
        (["--learning_rate=1e-4,1e-5"], ["--learning_rate is '1e-4,1e-5', but must be one number"]),
        (["--learning_rate=inf"], ["--learning_rate is 'inf', but must be a finite number"]),
        (["--huber_c=1,2"], ["--huber_c is '1,2', but must be one number"]),
        (["--network_alpha="], ["--network_alpha is '', but must be a number"]),
    ],
)  # fmt: skip
def test_refused(arguments, expected):
    assert read(*arguments).problems == expected


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--max_train_epoch", "2"], {"max_train_epochs": 2}), (["--save_every_n_epoch=1"], {"save_every_n_epochs": 1}),
    (["--prior_loss", "0.5"], {"prior_loss_weight": 0.5}), (["--cache_latents_to"], {"cache_latents_to_disk": True}),
    (["--text_encoder_l", "1e-4", "2e-5"], {"text_encoder_lr": [1e-4, 2e-5]}),
])  # fmt: skip
def test_flags_may_be_shortened(arguments, expected):
    given, ((name, value),) = read(*arguments), expected.items()
    assert given.problems == [] and given.values == {name: value}
    short = arguments[0].partition("=")[0]
    assert given.warnings == [f"{short} is taken for --{name}: write flags in full, as another one may begin like this some day"]


def test_exact_names_and_those_of_other_scripts_are_not_short_for_others():
    assert read("--cache_latents").warnings == [] and read("--resume=x").values == {"resume": "x"}
    (problem,) = read("--clip_l=x").problems
    assert "it belongs to sd3_train_network.py" in problem
    many = read("--save").problems[0]
    assert many.startswith("--save may be short for --save") and " more: write it in full" in many


def test_help_is_asked_for():
    assert wants_help(["--seed=1", "-h"]) and wants_help(["--help"]) and not wants_help(["--helper"])
