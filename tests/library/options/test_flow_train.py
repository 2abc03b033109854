"""The options of sd3_train_network.py and lumina_train_network.py: as declared, and what they have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.declare import warnings_of
from library.options.lumina import LuminaTrainOptions
from library.options.sd3 import Sd3TrainOptions
from tests.library.options.reference import SPECS, declared, facts, is_as_in, reference_rows

SETS = {"sd3_train_network": Sd3TrainOptions, "lumina_train_network": LuminaTrainOptions}
SD3, LUMINA = SETS
NETWORKS = {SD3: "networks.lora_sd3", LUMINA: "networks.lora_lumina"}
OURS = {
    "dry_run", "deterministic", "skip_bad_images", "cache_dir", "caption_variants", "show_captions", "save_best",
    "import_reference_caches", "save_format", "show_timesteps", "attn_mode", "split_attn", "unsloth_offload_checkpointing",
}  # fmt: skip
OURS_IN = {SD3: set(), LUMINA: {"gemma2_tokenizer"}}
OTHER_DEFAULTS = {"sample_sampler": None}  # the reference's is for other models
REQUIRED = {"pretrained_model_name_or_path": "model.safetensors", "dataset_config": "my.toml", "output_dir": "out"}


def read(script: str, arguments: str = "", *, without: str = ""):
    required = {**REQUIRED, "network_module": NETWORKS[script]}
    return read_options(
        SETS[script], [*(f"--{name}={value}" for name, value in required.items() if name != without), *arguments.split()]
    )


def problems(script: str, arguments: str = "", *, without: str = "") -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read(script, arguments, without=without)
    return caught.value.problems


def rows() -> list[tuple[str, dict]]:
    return [(script, row) for script in SETS for row in reference_rows(script)]


@pytest.mark.parametrize(("script", "flags"), [(SD3, 218), (LUMINA, 213)])
def test_flags_are_the_reference_s_and_ours(script, flags):
    names = {row["name"] for row in reference_rows(script)}
    assert len(names) == flags and set(declared(SETS[script])) == names | OURS | OURS_IN[script]


@pytest.mark.parametrize(("script", "row"), rows(), ids=[f"{script}-{row['name']}" for script, row in rows()])
def test_type_default_and_choices_are_the_reference_s(script, row):
    assert is_as_in(declared(SETS[script])[row["name"]], row, **OTHER_DEFAULTS)


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
@pytest.mark.parametrize("script", SETS)
def test_table_is_the_spec(script):
    assert list(facts(script).values()) == reference_rows(script)


# required, or nothing happens without them
WITHOUT_A_DEFAULT_MEANING = {
    *REQUIRED, "network_module", "config_file", "train_data_dir", "reg_data_dir", "conditioning_data_dir", "in_json", "resolution",
    "caption_extention", "secondary_separator", "lr_scheduler_args", "optimizer_args", "network_args", "lr_scheduler_min_lr_ratio",
    "save_n_epoch_ratio", "training_comment", "resume", "sample_prompts", "logging_dir", "log_tracker_config", "console_log_file",
    "base_weights",
}  # fmt: skip


@pytest.mark.parametrize("script", SETS)
def test_every_option_explains_itself(script):
    for option in declared(SETS[script]).values():
        assert len(option.help) > 8 and option.help.isascii() and not option.help.endswith("."), option.name
        if option.default is None and not option.name.startswith("metadata_"):
            assert "not set" in option.help or option.name in WITHOUT_A_DEFAULT_MEANING, option.name
        assert not option.choices or option.default is None or option.default in option.choices, option.name


@pytest.mark.parametrize("script", SETS)
@pytest.mark.parametrize("name", [*REQUIRED, "network_module"])
def test_each_required_flag(script, name):
    (problem,) = problems(script, without=name)
    assert f"--{name}" in problem
    assert name != "network_module" or f"--network_module={NETWORKS[script]}" in problem


@pytest.mark.parametrize("script", SETS)
def test_models_may_be_inside_the_checkpoint_and_the_dataset_on_the_command_line(script):
    options = read(script)
    assert options.model.vae is None and options.dataset.dataset_config == Path("my.toml")
    assert list(warnings_of(options)) == [] and options.objective == options.flow.objective


MODELS = {SD3: "SD3", LUMINA: "Lumina Image 2.0"}
REFUSED = [
    # arguments, what the problem says; {} = the model
    ("--v2", "--v2 cannot be used: it is about "),
    ("--clip_skip=2", "--clip_skip=2 cannot be used: it is about "),
    ("--max_token_length=225", "--max_token_length=225 cannot be used: it is about "),
    ("--weighted_captions", "--weighted_captions cannot be used: it is about "),
    ("--v_parameterization", "--v_parameterization cannot be used: it changes how models with a table of noise levels"),
    ("--zero_terminal_snr", "and {} is a flow model"),
    ("--min_snr_gamma=5", "--min_snr_gamma=5.0 cannot be used: it changes"),
    ("--scale_v_pred_loss_like_noise_pred", "and {} is a flow model"),
    ("--v_pred_like_loss=0.1", "and {} is a flow model"),
    ("--debiased_estimation_loss", "and {} is a flow model"),
    ("--loss_type=huber", "--huber_schedule is snr, which --loss_type=huber cannot use with a flow model"),
    ("--min_timestep=500 --max_timestep=500", "--min_timestep is 500, not below --max_timestep"),
    ("--logit_std=0", "--logit_std is 0.0"),
    ("--fp8_base", "--fp8_base needs --mixed_precision=bf16 or fp16, not no"),
    ("--fp8_base_unet", "--fp8_base_unet needs --mixed_precision=bf16 or fp16, not no"),
    ("--blocks_to_swap=-1", "--blocks_to_swap is -1: give 0 or more"),
    ("--cpu_offload_checkpointing --unsloth_offload_checkpointing", "are two ways to do one thing: keep one"),
    (
        "--attn_mode=sageattn",
        "--attn_mode=sageattn cannot train: the kernel has no backward pass; give --attn_mode=torch, and keep",
    ),
    ("--qwen3=x", "unknown flag --qwen3: it belongs to anima_train_network.py, not to this script"),
    ("--unet_lr=0 --network_train_unet_only", "--unet_lr is 0, so that the denoiser is not trained"),
    ("--network_train_text_encoder_only --text_encoder_lr 0", "leaves nothing to train: raise the rate"),
]


@pytest.mark.parametrize("script", SETS)
@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_refused(script, arguments, expected):
    (problem,) = problems(script, arguments)
    assert expected.format(MODELS[script]) in problem


WARNED = [
    ("--sample_sampler=ddim", "--sample_sampler=ddim is no sampler for a flow model: pictures are drawn with euler"),
    ("--mem_eff_attn", "--mem_eff_attn does nothing: PyTorch's own attention"),
    ("--xformers --sdpa", "--sdpa does nothing: attention is computed by xformers"),
    ("--tokenizer_cache_dir=x", "--tokenizer_cache_dir does nothing: the tokenizer"),
    ("--network_train_unet_only --text_encoder_lr 1e-5", "--text_encoder_lr does nothing with --network_train_unet_only"),
]


@pytest.mark.parametrize("script", SETS)
@pytest.mark.parametrize(("arguments", "expected"), WARNED, ids=[arguments for arguments, _ in WARNED])
def test_warned(script, arguments, expected):
    (warning,) = warnings_of(read(script, arguments))
    assert expected in warning


@pytest.mark.parametrize("script", SETS)
@pytest.mark.parametrize(
    ("arguments", "checkpointing"),
    [("", None), ("--gradient_checkpointing", "device"), ("--cpu_offload_checkpointing", "cpu"),
     ("--gradient_checkpointing --unsloth_offload_checkpointing --blocks_to_swap=20", "cpu_async")],
)  # fmt: skip
def test_memory_is_saved_as_for_anima(script, arguments, checkpointing):
    assert read(script, arguments).memory.checkpointing == checkpointing


@pytest.mark.parametrize("script", SETS)
@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ("", "torch"),
        ("--sdpa", "torch"),
        ("--xformers", "xformers"),
        ("--attn_mode=sdpa", "torch"),
        ("--attn_mode=flash", "flash"),
    ],
)
def test_older_flags_name_a_kernel_too(script, arguments, mode):
    assert read(script, arguments).attention.mode == mode
