"""The options of train_network.py and sdxl_train_network.py: as declared, and the rules between them."""

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.declare import warnings_of
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from tests.library.options.reference import SPECS, declared, facts, is_as_in, reference_rows

SETS = {"train_network": StableDiffusionTrainOptions, "sdxl_train_network": SdxlTrainOptions}
SD, SDXL = SETS
OURS = {
    "dry_run", "deterministic", "skip_bad_images", "cache_dir", "caption_variants", "show_captions", "save_best",
    "import_reference_caches", "save_format", "show_timesteps", "attn_mode", "split_attn", "text_encoder_batch_size",
}  # fmt: skip
OURS_IN = {
    SD: {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "disable_mmap_load_safetensors"},
    SDXL: {"text_encoder_lr1", "text_encoder_lr2"},
}
REQUIRED = {
    "pretrained_model_name_or_path": "model.safetensors",
    "dataset_config": "my.toml",
    "output_dir": "out",
    "network_module": "networks.lora",
}
GUIDE_OF_SD = """--pretrained_model_name_or_path=model.ckpt --dataset_config=my.toml --output_dir=out --output_name=my_lora
    --network_module=networks.lora --network_dim=16 --network_alpha=1 --network_args conv_dim=4 conv_alpha=1 --learning_rate=1e-4
    --unet_lr=1e-4 --text_encoder_lr=1e-5 --optimizer_type=AdamW8bit --lr_scheduler=cosine_with_restarts --lr_warmup_steps=100
    --lr_scheduler_num_cycles=3 --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=fp16 --save_precision=fp16
    --save_model_as=safetensors --seed=42 --clip_skip=2 --max_token_length=225 --prior_loss_weight=1.0 --xformers
    --gradient_checkpointing --cache_latents --min_snr_gamma=5 --noise_offset=0.05 --adaptive_noise_scale=0.01
    --persistent_data_loader_workers"""
GUIDE_OF_SDXL = """--pretrained_model_name_or_path=sd_xl_base_1.0.safetensors --dataset_config=my.toml --output_dir=out
    --network_module=networks.lora --network_dim=32 --network_alpha=16 --learning_rate=1e-4 --unet_lr=1e-4 --text_encoder_lr1=1e-5
    --text_encoder_lr2=1e-5 --lr_scheduler=constant --optimizer_type=AdamW8bit --max_train_epochs=10 --save_every_n_epochs=1
    --mixed_precision=bf16 --gradient_checkpointing --cache_latents --sdpa --no_half_vae"""


def read(script: str, arguments: str = "", *, without: str = ""):
    required = [f"--{name}={value}" for name, value in REQUIRED.items() if name != without]
    return read_options(SETS[script], [*required, *arguments.split()])


def problems(script: str, arguments: str = "", *, without: str = "") -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read(script, arguments, without=without)
    return caught.value.problems


def rows() -> list[tuple[str, dict]]:
    return [(script, row) for script in SETS for row in reference_rows(script)]


@pytest.mark.parametrize(("script", "flags"), [(SD, 193), (SDXL, 196)])
def test_flags_are_the_reference_s_and_ours(script, flags):
    names = {row["name"] for row in reference_rows(script)}
    assert len(names) == flags and set(declared(SETS[script])) == names | OURS | OURS_IN[script]


@pytest.mark.parametrize(("script", "row"), rows(), ids=[f"{script}-{row['name']}" for script, row in rows()])
def test_type_default_and_choices_are_the_reference_s(script, row):
    assert is_as_in(declared(SETS[script])[row["name"]], row)


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
@pytest.mark.parametrize("script", SETS)
def test_table_is_the_spec(script):
    assert list(facts(script).values()) == reference_rows(script)


# required, or nothing happens without them
WITHOUT_A_DEFAULT_MEANING = {
    *REQUIRED, "config_file", "train_data_dir", "reg_data_dir", "conditioning_data_dir", "in_json", "resolution", "caption_extention",
    "secondary_separator", "lr_scheduler_args", "optimizer_args", "network_args", "lr_scheduler_min_lr_ratio", "save_n_epoch_ratio",
    "training_comment", "resume", "sample_prompts", "logging_dir", "log_tracker_config", "console_log_file", "base_weights",
}  # fmt: skip


@pytest.mark.parametrize("script", SETS)
def test_every_option_explains_itself(script):
    for option in declared(SETS[script]).values():
        assert len(option.help) > 8 and option.help.isascii() and not option.help.endswith("."), option.name
        if option.default is None and not option.name.startswith("metadata_"):
            assert "not set" in option.help or option.name in WITHOUT_A_DEFAULT_MEANING, option.name
        assert not option.choices or option.default is None or option.default in option.choices, option.name


@pytest.mark.parametrize("script", SETS)
@pytest.mark.parametrize("name", REQUIRED)
def test_each_required_flag(script, name):
    (problem,) = problems(script, without=name)
    assert f"--{name}" in problem


def test_commands_of_the_guides():
    sd, xl = read_options(SETS[SD], GUIDE_OF_SD.split()), read_options(SETS[SDXL], GUIDE_OF_SDXL.split())
    assert (sd.clip.clip_skip, sd.clip.max_token_length, sd.text_rates, sd.samples.sample_sampler) == (2, 225, (1e-5,), "ddim")
    assert xl.text_rates == (1e-5, 1e-5) and xl.model.vae is None and xl.model.no_half_vae
    assert list(warnings_of(sd)) == list(warnings_of(xl)) == []


def test_75_tokens_can_be_said():
    assert read(SD, "--max_token_length=75").clip.max_token_length == 75
    assert "--max_token_length is '77', but must be one of 75, 150, 225" in problems(SD, "--max_token_length=77")[0]


# arguments -> the rates of the text encoders; 0 = no LoRA
RATES = [
    (SD, "", (2e-6,)),
    (SD, "--learning_rate=1e-4", (1e-4,)),
    (SD, "--text_encoder_lr 1e-5", (1e-5,)),
    (SD, "--text_encoder_lr 1e-5 2e-5", (1e-5,)),
    (SD, "--text_encoder_lr 0", (0,)),
    (SD, "--learning_rate=0 --unet_lr=1e-4", (0,)),
    (SD, "--network_train_unet_only --text_encoder_lr 1e-5", (0,)),
    (SD, "--cache_text_encoder_outputs", (0,)),
    (SD, "--text_encoder_lr 0 --cache_text_encoder_outputs", (0,)),
    (SDXL, "", (2e-6, 2e-6)),
    (SDXL, "--text_encoder_lr 1e-5", (1e-5, 1e-5)),
    (SDXL, "--text_encoder_lr 1e-5 5e-6", (1e-5, 5e-6)),
    (SDXL, "--text_encoder_lr 1e-5 0", (1e-5, 0)),
    (SDXL, "--text_encoder_lr 0", (0, 0)),
    (SDXL, "--text_encoder_lr1=1e-5 --text_encoder_lr2=5e-6", (1e-5, 5e-6)),
    (SDXL, "--text_encoder_lr1=1e-5 --learning_rate=1e-4", (1e-5, 1e-4)),
    (SDXL, "--text_encoder_lr2=0 --learning_rate=1e-4", (1e-4, 0)),
    (SDXL, "--text_encoder_lr 1e-5 5e-6 --text_encoder_lr2=5e-6", (1e-5, 5e-6)),
    (SDXL, "--text_encoder_lr 1e-5 --text_encoder_lr2=1e-5", (1e-5, 1e-5)),
    (SDXL, "--network_train_unet_only --text_encoder_lr1=1e-5", (0, 0)),
    (SDXL, "--cache_text_encoder_outputs_to_disk --text_encoder_lr1=0", (0, 0)),
]


@pytest.mark.parametrize(("script", "arguments", "expected"), RATES, ids=[f"{script} {a}" for script, a, _ in RATES])
def test_rates_of_the_text_encoders(script, arguments, expected):
    options = read(script, arguments)
    assert options.text_rates == expected
    assert options.trains_text_encoder is any(expected)


CACHED = "cannot be combined with --cache_text_encoder_outputs: a text encoder that is trained must run at every step"
REFUSED = [
    (SD, "--clip_skip=0", "--clip_skip is 0: give 1 or more"),
    (SD, "--text_encoder_lr 1e-5 --cache_text_encoder_outputs", f"--text_encoder_lr 1e-05 {CACHED}"),
    (SD, "--network_train_text_encoder_only --text_encoder_lr 0", "with --text_encoder_lr 0 leaves nothing to train"),
    (SD, "--network_train_text_encoder_only --learning_rate 0", "with --learning_rate 0 leaves nothing to train"),
    (SD, "--unet_lr 0 --text_encoder_lr 0", "--unet_lr is 0, so that the denoiser is not trained"),
    (SD, "--full_fp16", "--full_fp16 needs --mixed_precision=fp16, not no"),
    (SD, "--full_bf16 --mixed_precision=fp16", "--full_bf16 needs --mixed_precision=bf16, not fp16"),
    (SD, "--fp8_base", "--fp8_base needs --mixed_precision=bf16 or fp16, not no"),
    (SD, "--fp8_base_unet", "--fp8_base_unet needs --mixed_precision=bf16 or fp16, not no"),
    (SD, "--scale_v_pred_loss_like_noise_pred", "--scale_v_pred_loss_like_noise_pred needs --v_parameterization"),
    (SD, "--v_pred_like_loss=0.1 --v_parameterization", "--v_pred_like_loss=0.1 cannot be combined with --v_parameterization"),
    (SD, "--sample_sampler=eulr", "--sample_sampler is 'eulr', but must be one of ddim"),
    (SDXL, "--v2", "--v2 cannot be used: it says that a checkpoint is Stable Diffusion 2.x, which train_network.py trains"),
    (SDXL, "--text_encoder_lr 1e-5 0 --cache_text_encoder_outputs", f"--text_encoder_lr 1e-05 0 {CACHED}"),
    (SDXL, "--text_encoder_lr2=1e-5 --cache_text_encoder_outputs", f"--text_encoder_lr2 1e-05 {CACHED}"),
    (SDXL, "--network_train_text_encoder_only --cache_text_encoder_outputs", f"--network_train_text_encoder_only {CACHED}"),
    (SDXL, "--text_encoder_lr 1e-5 --text_encoder_lr2=2e-5", "--text_encoder_lr2 is 2e-05, but --text_encoder_lr gives that text encoder 1e-05"),
    (SDXL, "--text_encoder_lr 1e-5 2e-5 --text_encoder_lr1=0", "--text_encoder_lr1 is 0, but --text_encoder_lr gives"),
    (SDXL, "--text_encoder_lr1=-1", "--text_encoder_lr1 is -1.0: give 0 or more"),
    (SDXL, "--network_train_text_encoder_only --text_encoder_lr1=0 --text_encoder_lr2=0", "with --text_encoder_lr 0 0 leaves nothing"),
    (SDXL, "--deepspeed --zero_stage=7", "--zero_stage is '7'"),
    (SD, "--mixed_precision=fp32", "must be one of no, fp16, bf16 (did you mean no?)"),
    (SD, "--save_precision=fp32", "(did you mean float?)"),
    (SD, "--mixed_precision=bfloat16", "(did you mean bf16?)"),
    (SDXL, "--text_encoder_lr=5e-5,1e-5", ": write them as separate words, with blanks between, --text_encoder_lr 5e-5 1e-5"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "expected"), REFUSED, ids=[f"{script} {a}" for script, a, _ in REFUSED])
def test_refused(script, arguments, expected):
    assert any(expected in problem for problem in problems(script, arguments))


NOT_HERE = [
    (SD, "--qwen3=x", "unknown flag --qwen3: it belongs to anima_train_network.py, not to this script; drop --qwen3"),
    (SD, "--discrete_flow_shift=3", "unknown flag --discrete_flow_shift: it belongs to lumina_train_network.py and anima_"),
    (SD, "--timestep_sampling=shift", "unknown flag --timestep_sampling: it belongs to lumina_train_network.py and anima_"),
    (SD, "--text_encoder_lr1=1e-5", "unknown flag --text_encoder_lr1: it belongs to sdxl_train_network.py, not to this script"),
    (SDXL, "--blocks_to_swap=3", "unknown flag --blocks_to_swap: it belongs to sd3_train_network.py, lumina_"),
    (
        SDXL,
        "--unsloth_offload_checkpointing",
        "unknown flag --unsloth_offload_checkpointing: it belongs to sd3_train_network.py, ",
    ),
]


@pytest.mark.parametrize(("script", "arguments", "expected"), NOT_HERE, ids=[f"{script} {a}" for script, a, _ in NOT_HERE])
def test_flags_of_another_script_name_it(script, arguments, expected):
    (problem,) = problems(script, arguments)
    assert problem.startswith(expected)


def test_keys_of_another_script_in_a_config_file(tmp_path):
    (tmp_path / "my.toml").write_text('qwen3 = "x"\n', encoding="utf-8")
    (problem,) = problems(SDXL, f"--config_file={tmp_path / 'my.toml'}")
    assert problem.endswith("unknown key qwen3: it belongs to anima_train_network.py, not to this script; take it out")


WARNED = [
    (SD, "--text_encoder_lr 1e-5 2e-5", "--text_encoder_lr: Stable Diffusion has one text encoder: only the first rate counts, 1e-05"),
    (SDXL, "--text_encoder_lr 1e-5 2e-5 3e-5", "--text_encoder_lr: SDXL has 2 text encoders: only the first 2 rates count, 1e-05 2e-05"),
    (SD, "--network_train_unet_only --text_encoder_lr 1e-5", "--text_encoder_lr does nothing with --network_train_unet_only"),
    (SDXL, "--network_train_unet_only --text_encoder_lr2=1e-5", "--text_encoder_lr2 does nothing with --network_train_unet_only"),
    (SD, "--tokenizer_cache_dir=x", "--tokenizer_cache_dir does nothing: the tokenizers come with this project"),
    (SDXL, "--huggingface_token=hf_x", "--huggingface_token does nothing without --huggingface_repo_id or --resume"),
    (SD, "--mem_eff_attn", "--mem_eff_attn does nothing"),
    (SDXL, "--cache_text_encoder_outputs_to_disk", "--cache_text_encoder_outputs without --network_train_unet_only: a text encoder"),
    (SDXL, "--clip_skip=2", "--clip_skip=2 goes into the metadata only"),
    (SDXL, "--mixed_precision=fp16", "--mixed_precision=fp16 runs SDXL's VAE in fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "expected"), WARNED, ids=[f"{script} {a}" for script, a, _ in WARNED])
def test_warned(script, arguments, expected):
    (warning,) = warnings_of(read(script, arguments))
    assert expected in warning


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (SD, "--clip_skip=2 --mixed_precision=fp16"),
        (SDXL, "--mixed_precision=fp16 --no_half_vae"),
        (SDXL, "--mixed_precision=fp16 --vae=fixed.safetensors"),
        (SDXL, "--text_encoder_lr 1e-5 0"),
        (SD, "--weighted_captions --cache_text_encoder_outputs --network_train_unet_only"),
        (SD, "--cache_text_encoder_outputs --text_encoder_lr 0"),
        (SD, "--enable_bucket --bucket_no_upscale"),
        (SD, "--huggingface_token=hf_x --vae=someone/their-vae"),
    ],
)
def test_not_warned(script, arguments):
    assert list(warnings_of(read(script, arguments))) == []


@pytest.mark.parametrize("place", ["model.ckpt", "folder", "stabilityai/stable-diffusion-2-1"])
def test_a_model_is_a_file_a_folder_or_a_repository(place):
    options = read(SD, f"--pretrained_model_name_or_path={place} --vae={place}", without="pretrained_model_name_or_path")
    assert options.model.pretrained_model_name_or_path == options.model.vae == place


def test_arguments_that_stand_in_one_word():
    (problem,) = problems_of_words("--network_args", "conv_dim=4 conv_alpha=1")
    assert problem == (
        "--network_args 'conv_dim=4 conv_alpha=1' is one word, in which 2 arguments stand: write them as separate words, with "
        "blanks between and no quotes around all, --network_args conv_dim=4 conv_alpha=1; in a config file as separate texts of "
        "the list"
    )


def problems_of_words(*words: str) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read_options(SETS[SD], [*(f"--{name}={value}" for name, value in REQUIRED.items()), *words])
    return caught.value.problems


@pytest.mark.parametrize(
    "argument",
    ["conv_dim=4", "network_reg_lrs=.*mlp.*=1e-4, .*attn.*=1e-5", "exclude_patterns=['a b', 'c=d']", "preset=my file.toml",
     "block_dims=1, 2, 3"],
)  # fmt: skip
def test_one_argument_may_hold_blanks(argument):
    required = [f"--{name}={value}" for name, value in REQUIRED.items()]
    assert read_options(SETS[SD], [*required, "--network_args", argument]).network.network_args == [argument]


def test_objective():
    assert read(SD).objective == "noise prediction (epsilon); timesteps 0 to 999 are drawn evenly"
    weighed = read(SDXL, "--v_parameterization --min_snr_gamma=5 --min_timestep=100 --debiased_estimation_loss")
    assert weighed.objective == ("velocity (v); timesteps 100 to 999 are drawn evenly, min_snr_gamma=5, debiased_estimation_loss")


def test_bucket_sides_that_are_not_used():
    flags = "--enable_bucket --bucket_no_upscale --min_bucket_reso=128 --max_bucket_reso=2048 --train_data_dir=x --resolution=512"
    (warning,) = warnings_of(read(SD, flags, without="dataset_config"))
    assert warning.startswith("--min_bucket_reso=128 and --max_bucket_reso=2048: not used with --bucket_no_upscale")
