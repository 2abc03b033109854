"""The options of anima_train_network.py: as declared, and the rules between them."""

from dataclasses import fields
from pathlib import Path

import pytest

from library.errors import OptionError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.options.declare import warnings_of
from tests.library.options.reference import SPECS, declared, facts, is_as_in, reference_rows

OURS = {
    "dry_run", "deterministic", "skip_bad_images", "cache_dir", "caption_variants", "show_captions", "save_best",
    "import_reference_caches", "save_format", "show_timesteps",
}  # fmt: skip
OTHER_DEFAULTS = {"sample_sampler": None}  # the reference's is for other models
REQUIRED = {
    "pretrained_model_name_or_path": "dit.safetensors",
    "qwen3": "qwen3.safetensors",
    "vae": "vae.safetensors",
    "dataset_config": "my.toml",
    "output_dir": "out",
    "network_module": "networks.lora_anima",
}
DECLARED = declared(AnimaTrainOptions)
ROWS = reference_rows("anima_train_network")

GUIDE = """--pretrained_model_name_or_path=dit.safetensors --qwen3=qwen3.safetensors --vae=vae.safetensors
    --dataset_config=my.toml --output_dir=out --output_name=my_anima_lora --save_model_as=safetensors
    --network_module=networks.lora_anima --network_dim=8 --learning_rate=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=constant
    --timestep_sampling=sigmoid --discrete_flow_shift=1.0 --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=bf16
    --gradient_checkpointing --cache_latents --cache_text_encoder_outputs --vae_chunk_size=64 --vae_disable_cache"""


def read(*arguments: str, without: str = "") -> AnimaTrainOptions:
    required = [f"--{name}={value}" for name, value in REQUIRED.items() if name != without]
    return read_options(AnimaTrainOptions, [*required, *arguments])


def problems(*arguments: str, without: str = "") -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read(*arguments, without=without)
    return caught.value.problems


def test_flags_are_the_reference_s_and_ours():
    assert set(DECLARED) == {row["name"] for row in ROWS} | OURS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_type_default_and_choices_are_the_reference_s(row):
    assert is_as_in(DECLARED[row["name"]], row, **OTHER_DEFAULTS)


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
def test_table_is_the_spec():
    found = facts("anima_train_network")
    assert [found[row["name"]] for row in ROWS] == ROWS


@pytest.mark.parametrize("option", DECLARED.values(), ids=lambda option: option.name)
def test_every_option_explains_itself(option):
    assert len(option.help) > 8 and option.help.isascii() and not option.help.endswith(".")
    if option.default is None:
        assert "not set" in option.help or option.name in WITHOUT_A_DEFAULT_MEANING


# required, or nothing happens without them
WITHOUT_A_DEFAULT_MEANING = {
    *REQUIRED, "config_file", "train_data_dir", "reg_data_dir", "conditioning_data_dir", "in_json", "resolution", "caption_extention", "secondary_separator",
    "lr_scheduler_args", "optimizer_args", "network_args", "lr_scheduler_min_lr_ratio", "save_n_epoch_ratio", "training_comment",
    "resume", "sample_prompts", "logging_dir", "log_tracker_config", "console_log_file", "base_weights",
    *(name for name in DECLARED if name.startswith("metadata_")),
}  # fmt: skip


def test_defaults_are_valid_choices():
    for option in DECLARED.values():
        assert not option.choices or option.default is None or option.default in option.choices


def test_group_names_are_those_that_others_use():
    names = {f.name for f in fields(AnimaTrainOptions)}
    assert names == {
        "attention", "clip", "compile", "ddpm", "distributed", "hub", "memory", "rates",
        "console", "run", "model", "anima", "dataset", "captions", "look", "caches", "saving", "resume", "metadata", "optimizer", "schedule",
        "loss", "noise", "flow", "validation", "network", "samples", "logging",
    }  # fmt: skip


def test_command_of_the_guide():
    options = read_options(AnimaTrainOptions, GUIDE.split())
    assert options.network.network_dim == 8 and options.optimizer.learning_rate == 1e-4
    assert options.run.max_train_epochs == 10 and options.run.mixed_precision == "bf16" and options.memory.gradient_checkpointing
    assert options.caches.latents_cached and options.caches.text_cached and not options.caches.any_on_disk
    assert options.anima.vae_chunk_size == 64 and options.anima.vae_disable_cache
    assert options.dataset.dataset_config == Path("my.toml")
    assert list(warnings_of(options)) == []


TRAINS_TEXT_ENCODER = [
    ("", True),
    ("--text_encoder_lr 1e-5", True),
    ("--text_encoder_lr 0", False),
    ("--text_encoder_lr 0 1e-4", False),  # there is one text encoder
    ("--text_encoder_lr 0 1e-4 --cache_text_encoder_outputs", False),
    ("--text_encoder_lr 0 --cache_text_encoder_outputs", False),
    ("--network_train_text_encoder_only", True),
    ("--network_train_unet_only", False),
    ("--network_train_unet_only --text_encoder_lr 1e-5", False),
    ("--network_train_unet_only --text_encoder_lr 1e-5 --cache_text_encoder_outputs", False),
    ("--cache_text_encoder_outputs", False),
    ("--cache_text_encoder_outputs_to_disk", False),
]


@pytest.mark.parametrize(("arguments", "expected"), TRAINS_TEXT_ENCODER, ids=[a or "nothing" for a, _ in TRAINS_TEXT_ENCODER])
def test_text_encoder_is_trained_unless_it_is_switched_off_or_cached(arguments, expected):
    assert read(*arguments.split()).trains_text_encoder is expected


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [("", "torch"), ("--sdpa", "torch"), ("--attn_mode=sdpa", "torch"), ("--xformers", "xformers"), ("--attn_mode=flash", "flash"),
     ("--attn_mode=xformers --xformers", "xformers"), ("--attn_mode=torch --sdpa", "torch")],
)  # fmt: skip
def test_older_flags_name_a_kernel_too(arguments, mode):
    assert read(*arguments.split()).attention.mode == mode


def test_caching_to_disk_implies_caching():
    caches = read("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk").caches
    assert caches.latents_cached and caches.text_cached and not caches.cache_latents


def test_all_that_is_missing_is_told_at_once():
    with pytest.raises(OptionError) as caught:
        read_options(AnimaTrainOptions, [])
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == len(REQUIRED)
    assert all(f"--{name}" in text for name in REQUIRED)


@pytest.mark.parametrize("name", REQUIRED)
def test_each_required_flag(name):
    (problem,) = problems(without=name)
    assert f"--{name}" in problem


def test_missing_network_module_names_ours():
    assert "--network_module=networks.lora_anima" in problems(without="network_module")[0]


REFUSED = [
    # arguments, what the problem says
    ("--seed=-1", "--seed is -1: give a whole number from 0"),
    ("--seed=4294967296", "--seed is 4294967296"),
    ("--max_train_steps=0", "--max_train_steps is 0: give 1 or more"),
    ("--max_train_epochs=0", "--max_train_epochs is 0"),
    ("--gradient_accumulation_steps=0", "--gradient_accumulation_steps is 0"),
    ("--full_bf16", "--full_bf16 needs --mixed_precision=bf16, not no"),
    ("--full_fp16 --mixed_precision=bf16", "--full_fp16 needs --mixed_precision=fp16, not bf16"),
    ("--full_fp16 --full_bf16 --mixed_precision=bf16", "--full_fp16 cannot be combined with --full_bf16"),
    ("--train_batch_size=0", "--train_batch_size is 0"),
    ("--max_data_loader_n_workers=-1", "--max_data_loader_n_workers is -1: give 0 or more"),
    ("--prior_loss_weight=-1", "--prior_loss_weight is -1.0"),
    ("--resolution=big", "--resolution is 'big': give N or WIDTH,HEIGHT"),
    (
        "--enable_bucket --min_bucket_reso=512 --max_bucket_reso=256",
        "--min_bucket_reso is 512, above --max_bucket_reso, which is 256",
    ),
    ("--bucket_reso_steps=0 --enable_bucket", "--bucket_reso_steps is 0: give 1 or more"),
    ("--keep_tokens=-1", "--keep_tokens is -1"),
    ("--token_warmup_min=-1", "--token_warmup_min is -1: give 0 or more"),
    ("--token_warmup_step=-0.5", "--token_warmup_step is -0.5: give 0 or more"),
    ("--face_crop_aug_range=2", "--face_crop_aug_range is '2', but must be two numbers above 0, MIN,MAX, for example 2.0,4.0"),
    ("--face_crop_aug_range=4,2", "--face_crop_aug_range is '4,2'"),
    ("--face_crop_aug_range=0,2", "--face_crop_aug_range is '0,2'"),
    ("--face_crop_aug_range=1,inf", "--face_crop_aug_range is '1,inf'"),
    ("--validation_split=1.5", "--validation_split is 1.5: give a number from 0 to 1"),
    ("--validate_every_n_steps=0", "--validate_every_n_steps is 0: give 1 or more"),
    ("--validate_every_n_epochs=0", "--validate_every_n_epochs is 0"),
    ("--max_validation_steps=0", "--max_validation_steps is 0"),
    ("--show_captions=0", "--show_captions is 0: give 1 or more"),
    ("--caption_dropout_rate=1.5", "--caption_dropout_rate is 1.5: give a number from 0 to 1"),
    ("--caption_tag_dropout_rate=-0.1", "--caption_tag_dropout_rate is -0.1"),
    ("--caption_separator=", "--caption_separator is empty"),
    ("--vae_batch_size=0", "--vae_batch_size is 0"),
    ("--caption_variants=2", "--caption_variants needs --cache_text_encoder_outputs"),
    ("--caption_variants=0 --cache_text_encoder_outputs", "--caption_variants is 0"),
    ("--save_every_n_epochs=0", "--save_every_n_epochs is 0"),
    ("--save_last_n_steps_state=0", "--save_last_n_steps_state is 0"),
    ("--output_name=a/b", "--output_name is 'a/b': give the start of a file name; the folder is --output_dir"),
    (f"--output_name={'x' * 201}", "--output_name has 201 bytes: give at most 200"),
    ('--output_name=a:b?"', "file names cannot hold '\"' ':' '?' on Windows"),
    ("--output_name=a\x07b", "file names cannot hold '\\x07' on Windows"),
    ("--initial_epoch=0", "--initial_epoch is 0: give 1 or more"),
    ("--initial_step=-1", "--initial_step is -1: give 0 or more"),
    ("--skip_until_initial_step", "--skip_until_initial_step needs --initial_step, --initial_epoch or --resume"),
    ("--learning_rate=-1e-4", "--learning_rate is -0.0001: give 0 or more"),
    ("--network_train_unet_only --text_encoder_lr 1e-4 -1e-4", "--text_encoder_lr is 0.0001 -0.0001"),
    (
        "--text_encoder_lr 1e-4 --cache_text_encoder_outputs",
        "--text_encoder_lr 0.0001 cannot be combined with --cache_text_encoder_outputs: a text encoder that is trained",
    ),
    (
        "--network_train_text_encoder_only --cache_text_encoder_outputs_to_disk",
        "--network_train_text_encoder_only cannot be combined with --cache_text_encoder_outputs_to_disk",
    ),
    ("--network_train_text_encoder_only --text_encoder_lr 0", "leaves nothing to train: raise the rate"),
    (
        "--network_train_text_encoder_only --self_attn_lr=1e-4 --mod_lr=0",
        "--self_attn_lr, --mod_lr cannot be combined with --network_train_text_encoder_only",
    ),
    ("--max_grad_norm=-1", "--max_grad_norm is -1.0"),
    ("--use_8bit_adam --optimizer_type=Lion", "--optimizer_type and --use_8bit_adam each name an optimizer"),
    ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam and --use_lion_optimizer"),
    ("--lr_warmup_steps=100", "--lr_scheduler=constant has no warm-up: use --lr_scheduler=constant_with_warmup"),
    ("--lr_warmup_steps=100 --lr_scheduler=adafactor", "--lr_scheduler=adafactor has no warm-up: drop --lr_warmup_steps"),
    ("--lr_warmup_steps=10% --lr_scheduler_type=CosineAnnealingLR", "the class of --lr_scheduler_type has no warm-up"),
    ("--lr_warmup_steps=-5 --lr_scheduler=linear", "--lr_warmup_steps is -5: give 0 or more"),
    ("--lr_decay_steps=150%", "--lr_decay_steps is 150% of the run"),
    ("--lr_scheduler_num_cycles=0", "--lr_scheduler_num_cycles is 0"),
    ("--lr_scheduler_power=0", "--lr_scheduler_power is 0.0: give a number above 0"),
    ("--lr_scheduler_min_lr_ratio=2", "--lr_scheduler_min_lr_ratio is 2.0"),
    ("--huber_c=0", "--huber_c is 0.0"),
    (
        "--loss_type=huber",
        "--huber_schedule is snr, which --loss_type=huber cannot use with a flow model: give --huber_schedule=constant",
    ),
    ("--loss_type=smooth_l1 --huber_schedule=snr", "--huber_schedule is snr, which --loss_type=smooth_l1"),
    ("--adaptive_noise_scale=0.1", "--adaptive_noise_scale needs --noise_offset"),
    ("--noise_offset=-0.1", "--noise_offset is -0.1"),
    ("--min_timestep=500 --max_timestep=500", "--min_timestep is 500, not below --max_timestep, which is 500"),
    ("--min_timestep=-1", "--min_timestep is -1: give a timestep from 0 to 1000"),
    ("--max_timestep=1001", "--max_timestep is 1001"),
    ("--sigmoid_scale=0", "--sigmoid_scale is 0.0"),
    ("--discrete_flow_shift=0", "--discrete_flow_shift is 0.0"),
    ("--network_dim=0", "--network_dim is 0: give 1 or more"),
    ("--network_alpha=-1", "--network_alpha is -1.0: give 0 or more"),
    ("--network_dropout=1", "--network_dropout is 1.0: give a number from 0 to below 1"),
    ("--scale_weight_norms=-1", "--scale_weight_norms is -1.0"),
    ("--dim_from_weights", "--dim_from_weights needs --network_weights"),
    ("--base_weights a b --base_weights_multiplier 1 1 1", "--base_weights_multiplier has 3 numbers, but --base_weights has 2"),
    ("--sample_every_n_steps=10", "--sample_every_n_steps needs --sample_prompts"),
    ("--sample_at_first", "--sample_at_first needs --sample_prompts"),
    ("--log_with=tensorboard", "--log_with=tensorboard needs --logging_dir"),
    ("--log_with=all", "--log_with=all needs --logging_dir"),
    ("--qwen3_max_token_length=513", "--qwen3_max_token_length is 513: give 1 to 512 tokens"),
    ("--t5_max_token_length=0", "--t5_max_token_length is 0"),
    ("--vae_chunk_size=63", "--vae_chunk_size is 63: give an even number"),
    ("--vae_chunk_size=0", "--vae_chunk_size is 0"),
    ("--v2", "--v2 cannot be used: it is about Stable Diffusion's CLIP text encoders"),
    ("--clip_skip=2", "--clip_skip=2 cannot be used"),
    ("--max_token_length=225", "--max_token_length=225 cannot be used"),
    ("--weighted_captions", "--weighted_captions cannot be used"),
    ("--v_parameterization", "--v_parameterization cannot be used: it changes how models with a table of noise levels"),
    ("--zero_terminal_snr", "--zero_terminal_snr cannot be used"),
    ("--min_snr_gamma=5", "--min_snr_gamma=5.0 cannot be used"),
    ("--scale_v_pred_loss_like_noise_pred", "--scale_v_pred_loss_like_noise_pred cannot be used"),
    ("--v_pred_like_loss=0.1", "--v_pred_like_loss=0.1 cannot be used"),
    ("--debiased_estimation_loss", "--debiased_estimation_loss cannot be used"),
    ("--fp8_base", "--fp8_base needs --mixed_precision=bf16 or fp16, not no"),
    ("--fp8_base_unet", "--fp8_base_unet needs --mixed_precision=bf16 or fp16, not no"),
    ("--blocks_to_swap=-1", "--blocks_to_swap is -1: give 0 or more"),
    ("--cpu_offload_checkpointing --unsloth_offload_checkpointing", "are two ways to do one thing: keep one"),
    ("--fused_backward_pass", "--fused_backward_pass needs --max_grad_norm=0, not 1.0"),
    (
        "--fused_backward_pass --max_grad_norm=0 --gradient_accumulation_steps=2",
        "--fused_backward_pass needs --gradient_accumulation_steps=1, not 2",
    ),
    (
        "--fused_backward_pass --max_grad_norm=0 --mixed_precision=fp16",
        "--fused_backward_pass cannot be combined with --mixed_precision=fp16",
    ),
    ("--attn_mode=sageattn", "--attn_mode=sageattn cannot train: the kernel has no backward pass; give --attn_mode=torch"),
    ("--self_attn_lr=-1", "--self_attn_lr is -1.0: give 0 or more"),
    ("--cross_attn_lr=-1", "--cross_attn_lr is -1.0: give 0 or more"),
    ("--mlp_lr=-1", "--mlp_lr is -1.0: give 0 or more"),
    ("--mod_lr=-1", "--mod_lr is -1.0: give 0 or more"),
    ("--llm_adapter_lr=-1", "--llm_adapter_lr is -1.0: give 0 or more"),
    (
        "--network_train_unet_only --network_train_text_encoder_only",
        "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train",
    ),
    ("--dataset_class=my.Dataset", "--dataset_class=my.Dataset cannot be used: a class written for kohya-ss/sd-scripts"),
    ("--ddp_timeout=-1", "--ddp_timeout is -1: give 0 or more"),
    ("--deepspeed --zero_stage=3", "--zero_stage=3 cannot be used: it shares weights that are trained"),
    ("--huggingface_repo_type=models", "--huggingface_repo_type is models: give one of model, dataset, space"),
    ("--huggingface_repo_id=mine", "--huggingface_repo_id is 'mine': give OWNER/NAME"),
    ("--huggingface_repo_id=a/b/c", "--huggingface_repo_id is 'a/b/c': give OWNER/NAME"),
    ("--save_state_to_huggingface", "--save_state_to_huggingface needs --huggingface_repo_id"),
    ("--resume_from_huggingface", "--resume_from_huggingface needs --resume=OWNER/NAME/FOLDER"),
    ("--resume_from_huggingface --resume=latest", "--resume_from_huggingface needs --resume=OWNER/NAME/FOLDER"),
    ("--resume_from_huggingface --resume=me/lora", "--resume is 'me/lora': give OWNER/NAME/FOLDER[:REVISION[:TYPE]]"),
    ("--resume_from_huggingface --resume=me/lora/s:main:models", "with the type model, dataset or space, not models"),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_refused(arguments, expected):
    (problem,) = problems(*arguments.split())
    assert expected in problem


def test_dataset_by_flags():
    assert read("--train_data_dir=images", "--resolution=1024", without="dataset_config").dataset.train_data_dir == "images"
    (problem,) = problems("--train_data_dir=images", without="dataset_config")
    assert "--resolution is missing" in problem
    (problem,) = problems("--in_json=m.json", "--reg_data_dir=r", "--resolution=512", without="dataset_config")
    assert "--reg_data_dir cannot be combined with --in_json" in problem
    (problem,) = problems("--train_data_dir=i", "--conditioning_data_dir=m", "--resolution=512", without="dataset_config")
    assert "--conditioning_data_dir needs --masked_loss" in problem


ALLOWED = [
    "--learning_rate=0 --unet_lr=1e-4", "--sample_every_n_steps=0", "--network_alpha=0", "--full_bf16 --mixed_precision=bf16",
    "--lr_warmup_steps=10% --lr_scheduler=cosine", "--loss_type=huber --huber_schedule=exponential", "--max_timestep=1000",
    "--skip_until_initial_step --resume=latest", "--log_with=wandb", "--base_weights a b --base_weights_multiplier 0.5",
    "--max_data_loader_n_workers=0", "--bucket_reso_steps=24", "--face_crop_aug_range=2.0,4.0", "--face_crop_aug_range=2,2",
    "--token_warmup_step=0.3", "--token_warmup_step=100", "--conditioning_data_dir=masks --masked_loss",
    "--fp8_base --fp8_base_unet --mixed_precision=bf16", "--fused_backward_pass --max_grad_norm=0 --mixed_precision=bf16",
    "--blocks_to_swap=26 --cpu_offload_checkpointing --gradient_checkpointing", "--attn_mode=sdpa --sdpa", "--ddp_timeout=0",
    "--resume_from_huggingface --resume=me/lora/states/a-state:main:model", "--huggingface_repo_id=my-org/my_lora.v2",
    "--network_train_unet_only --self_attn_lr=1e-4",
]  # fmt: skip


@pytest.mark.parametrize("arguments", ALLOWED)
def test_allowed(arguments):
    assert isinstance(read(*arguments.split()), AnimaTrainOptions)


WARNED = [
    ("--xformers --sdpa", "--sdpa does nothing: attention is computed by xformers"),
    ("--attn_mode=flash --xformers", "--xformers does nothing: attention is computed by flash"),
    ("--network_train_unet_only --text_encoder_lr 1e-5", "--text_encoder_lr does nothing with --network_train_unet_only"),
    ("--train_data_dir=x", "--dataset_config describes the dataset; ignored: --train_data_dir"),
    ("--in_json=x --conditioning_data_dir=y", "ignored: --in_json, --conditioning_data_dir"),
    ("--cache_dir=c", "--cache_dir does nothing without"),
    ("--save_last_n_epochs=2", "--save_last_n_epochs does nothing without --save_every_n_epochs"),
    (
        "--save_every_n_steps=5 --save_last_n_steps_state=10",
        "--save_last_n_steps_state does nothing without --save_every_n_steps and",
    ),
    ("--ip_noise_gamma_random_strength", "--ip_noise_gamma_random_strength does nothing without --ip_noise_gamma"),
    ("--weighting_scheme=logit_normal", "--weighting_scheme=logit_normal does nothing with --timestep_sampling=sigmoid"),
    ("--sample_prompts=p.txt", "--sample_prompts draws nothing yet"),
    ("--wandb_run_name=x", "--wandb_run_name does nothing without --log_with=wandb"),
    ("--log_config", "--log_config does nothing without --logging_dir"),
    ("--mem_eff_attn", "--mem_eff_attn does nothing: PyTorch's own attention"),
    ("--tokenizer_cache_dir=x", "--tokenizer_cache_dir does nothing: the tokenizers come with this project"),
    ("--torch_compile --dynamo_backend=no", "--torch_compile does nothing with --dynamo_backend=no: nothing is compiled"),
    ("--dynamo_backend=eager", "--dynamo_backend=eager does nothing without --torch_compile"),
    ("--sample_sampler=ddim", "--sample_sampler=ddim is no sampler for a flow model: pictures are drawn with euler"),
    ("--zero_stage=3", "--zero_stage does nothing without --deepspeed"),
    ("--offload_optimizer_device=cpu", "--offload_optimizer_device does nothing without --deepspeed"),
    ("--offload_optimizer_nvme_path=x", "--offload_optimizer_nvme_path does nothing without --deepspeed"),
    ("--offload_param_device=nvme", "--offload_param_device does nothing without --deepspeed"),
    ("--offload_param_nvme_path=x", "--offload_param_nvme_path does nothing without --deepspeed"),
    ("--zero3_init_flag", "--zero3_init_flag does nothing without --deepspeed"),
    ("--zero3_save_16bit_model", "--zero3_save_16bit_model does nothing without --deepspeed"),
    ("--fp16_master_weights_and_gradients", "--fp16_master_weights_and_gradients does nothing without --deepspeed"),
    ("--huggingface_path_in_repo=x", "--huggingface_path_in_repo does nothing without --huggingface_repo_id"),
    ("--huggingface_repo_visibility=public", "--huggingface_repo_visibility does nothing without --huggingface_repo_id"),
    ("--async_upload", "--async_upload does nothing without --huggingface_repo_id"),
    ("--text_encoder_lr 0 1e-4", "--text_encoder_lr: Anima has one text encoder: only the first rate counts, 0"),
    ("--network_weights=a --dim_from_weights --network_dim=8", "--network_dim=8 does nothing with --dim_from_weights"),
    ("--huggingface_repo_type=dataset", "--huggingface_repo_type does nothing without --huggingface_repo_id"),
    ("--huggingface_token=hf_x", "--huggingface_token does nothing without --huggingface_repo_id or --resume_from_huggingface"),
    (
        "--huggingface_repo_id=me/lora --save_state_to_huggingface",
        "--save_state_to_huggingface does nothing without --save_state or --save_state_on_train_end",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), WARNED, ids=[arguments for arguments, _ in WARNED])
def test_warned(arguments, expected):
    (warning,) = warnings_of(read(*arguments.split()))
    assert expected in warning


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", True),
        ("--unet_lr 0", False),
        ("--learning_rate 0 --text_encoder_lr 1e-4", False),
        ("--learning_rate 0 --unet_lr 1e-4", True),
        ("--unet_lr 0 --mlp_lr 1e-4", True),
        ("--unet_lr 0 --mlp_lr 0", False),
        ("--unet_lr 0 --network_args network_reg_lrs=.*mlp.*=1e-4", True),
        ("--network_train_text_encoder_only", False),
    ],
)
def test_the_denoiser_is_trained_unless_it_is_switched_off_or_has_the_rate_0(arguments, expected):
    assert read(*arguments.split()).trains_denoiser is expected


@pytest.mark.parametrize("arguments", ["--unet_lr 0 --text_encoder_lr 0", "--unet_lr 0 --cache_text_encoder_outputs"])
def test_rates_that_leave_nothing_to_train(arguments):
    assert any("--unet_lr is 0" in problem and "nothing would be trained" in problem for problem in problems(*arguments.split()))


def test_the_denoiser_s_rate_does_nothing_for_the_text_encoder_alone():
    warnings = list(warnings_of(read("--network_train_text_encoder_only", "--unet_lr=1e-4")))
    assert any(warning.startswith("--unet_lr does nothing with --network_train_text_encoder_only") for warning in warnings)
