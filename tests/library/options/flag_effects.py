"""For every flag of the training scripts: the tests that show what it does, or that it is refused, or that its aim is met anyway.

Here is what holds for all scripts: a row counts for each of them. ``flag_effects_anima.py`` and ``flag_effects_sd.py`` have the
rows of flags whose effect lies in one architecture's own code. ``test_flag_effects.py`` holds all of it against the declared
options and the tests there are. A new option needs a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Effects:
    """``shown``: file below tests/ -> test -> the flags whose effect it shows. ``refused``: flag -> a command line that is refused
    for its sake, and what the error says. ``aim_met``: flag -> why nothing is left to do, and a test that shows it."""

    shown: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    aim_met: dict[str, tuple[str, str]] = field(default_factory=dict)


SHOWN: dict[str, dict[str, str]] = {
    # ------------------------------------------------------------ options, dataset and captions
    "library/options/test_command_line.py": {
        "test_command_line_beats_file_beats_default": "config_file",
        "test_output_config_reads_back_to_equal_options": "output_config",
    },
    "library/dataset/test_toml_config.py": {
        "test_named_folders_on_the_command_line": "train_data_dir reg_data_dir train_batch_size",
        "test_masks_of_named_folders": "conditioning_data_dir",
        "test_in_json": "in_json dataset_repeats",
        "test_caption_extension_without_dot_and_misspelt_flag": "caption_extension caption_extention",
        "test_json_with_null_falls_through": "dataset_config",
    },
    "library/dataset/test_masks.py": {"test_alpha_goes_the_way_of_its_image": "alpha_mask"},
    "library/dataset/test_info_file.py": {
        "test_the_file_is_made_in_the_references_form": "cache_info",
        "test_without_cache_info_there_is_no_file": "cache_info",
    },
    "library/dataset/test_buckets.py": {
        "test_several_resolutions_of_one_image": "resolution max_bucket_reso bucket_reso_steps",
        "test_without_buckets_everything_trains_at_the_resolution": "enable_bucket",
        "test_every_placement_covers_its_bucket": "bucket_no_upscale",
    },
    "golden/test_golden_data.py": {
        "test_bucket_of_every_image": "min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale",
        "test_resize_and_crop": "resize_interpolation",
    },
    "library/dataset/test_loader.py": {
        "test_live_batches_carry_pixels_and_captions": "flip_aug color_aug",
        "test_regularisation_images_weigh_less": "prior_loss_weight",
    },
    "library/dataset/test_augment.py": {
        "test_a_third_of_the_showings_change_their_colours": "color_aug",
        "test_random_crop_takes_every_place_alike": "random_crop",
        "test_face_takes_the_share_that_the_range_allows": "face_crop_aug_range",
    },
    "library/dataset/test_scan.py": {"test_bad_images_can_be_left_out": "skip_bad_images"},
    "test_trainers.py": {
        "test_what_changes_the_training_of_every_model": "network_dropout masked_loss",
        "test_fused_updates_change_nothing": "fused_backward_pass",
    },
    "e2e/test_masks.py": {"test_half_a_mask_trains_otherwise_and_caches_hold_it": "masked_loss"},
    "test_train_network.py": {
        "test_workers_and_saves_change_nothing": "max_data_loader_n_workers",
        "test_network_weights_are_the_start": "network_weights unet_lr",
        "test_ranks_come_from_the_weights": "dim_from_weights network_dim",
        "test_base_weights_are_merged_with_their_multiplier": "base_weights base_weights_multiplier",
        "test_max_norm_is_kept": "scale_weight_norms",
        "test_dry_run_trains_and_writes_nothing": "dry_run",
        "test_another_seed_is_another_run": "seed",
        "test_two_steps_train": "max_train_steps cache_latents cache_text_encoder_outputs",
        "test_cold_warm_and_live_give_the_same_weights": "cache_latents_to_disk cache_text_encoder_outputs_to_disk",
        "test_resume_latest_begins_anew_where_there_is_no_state_and_goes_on_where_there_is": "save_state_on_train_end resume",
        "test_resumed_equals_uninterrupted": "resume save_state",
        "test_accumulated_batches_make_one_step": "max_train_epochs gradient_accumulation_steps",
        "test_gradients_are_cut_at_their_norm": "max_grad_norm",
        "test_logged_rates_are_those_of_their_step": "learning_rate lr_scheduler logging_dir",
        "test_files_and_states_are_kept_and_removed_as_asked": "save_every_n_epochs save_last_n_epochs",
        "test_initial_step_skips_the_data_before_it": "initial_step skip_until_initial_step",
        "test_container_and_precision_of_the_file": "save_model_as save_precision",
        "test_minimum_metadata": "no_metadata",
        "test_metadata_tells_what_was_trained": "training_comment",
        "test_logging_and_sampling_change_nothing": "sample_prompts sample_every_n_steps sample_at_first",
    },
    "library/dataset/test_captions.py": {
        "test_shuffling_moves_every_tag_but_the_kept_ones": "shuffle_caption keep_tokens",
        "test_another_separator_cuts": "caption_separator",
        "test_marker_keeps_head_and_tail": "keep_tokens_separator",
        "test_secondary_separator_survives_shuffling": "secondary_separator",
        "test_wildcards_choose_alternatives_and_lines": "enable_wildcard caption_prefix caption_suffix",
        "test_dropout_rate_and_epochs": "caption_dropout_rate caption_dropout_every_n_epochs",
        "test_tag_dropout_drops_about_its_rate": "caption_tag_dropout_rate",
        "test_tags_warm_up_with_the_steps": "token_warmup_min token_warmup_step",
    },
    "library/training/test_look.py": {
        "test_the_page_and_its_facts": "debug_dataset",
        "test_captions_alone_write_nothing": "show_captions",
    },
    # ------------------------------------------------------------ caches
    "library/training/test_caching.py": {
        "test_how_much_is_encoded_at_a_time": "vae_batch_size text_encoder_batch_size",
        "test_what_another_program_cached_is_taken_over_and_nothing_is_loaded": "import_reference_caches",
        "test_highvram_keeps_gpu_memory_between_encoding": "highvram",
        "test_ddp_timeout_is_how_long_processes_wait": "ddp_timeout",
    },
    "library/dataset/caches/test_two_runs.py": {"test_what_a_file_lacks_that_was_not_checked": "skip_cache_check"},
    "library/dataset/caches/test_latent_cache.py": {"test_a_cache_folder_is_made_and_used": "cache_dir"},
    "library/training/test_cache_job.py": {"test_variants_are_counted_as_training_counts_them": "caption_variants"},
    # ------------------------------------------------------------ network
    "golden/test_golden_lora.py": {"test_modules_and_optimizer_groups": "network_alpha network_args"},
    # ------------------------------------------------------------ run, memory and speed
    "library/training/models/test_precision.py": {
        "test_deterministic_asks_for_kernels_of_a_fixed_order": "deterministic",
        "test_number_format_of_the_trained_weights": "full_fp16 full_bf16",
        "test_the_frozen_model_has_the_format_of_the_computation": "mixed_precision",
        "test_number_format_of_the_vae": "no_half_vae",
    },
    "library/training/models/test_model_memory.py": {
        "test_every_arrangement_gives_the_same_numbers": "cpu_offload_checkpointing",
    },
    "library/nn/test_attention_kernels.py": {
        "test_a_model_computes_with_the_kernel_it_was_given": "attn_mode",  # stand-ins for those that need a GPU
    },
    # ------------------------------------------------------------ optimizer and schedule
    "library/training/optimizing/test_optimizer_names.py": {
        "test_names": "optimizer_type",
        "test_older_flags": "use_8bit_adam use_lion_optimizer",
        "test_arguments_are_python_values": "optimizer_args",
    },
    "library/training/optimizing/test_deepspeed.py": {
        "test_trains_as_without_deepspeed": "deepspeed zero_stage",
        "test_flags_become_deepspeeds_configuration": "deepspeed zero_stage offload_optimizer_device max_grad_norm",
    },
    "library/training/optimizing/test_deepspeed_runs.py": {
        "test_two_processes_train_and_resume_as_without_deepspeed": "deepspeed zero_stage offload_optimizer_device",
    },
    "library/training/optimizing/test_schedules.py": {
        "test_class_of_torch": "lr_scheduler_type lr_scheduler_args",
        "test_warmup_as_a_share_of_the_run": "lr_warmup_steps",
        "test_warmup_stable_decay": "lr_decay_steps",
        "test_cosine_with_restarts": "lr_scheduler_num_cycles",
        "test_polynomial": "lr_scheduler_power",
        "test_inverse_sqrt": "lr_scheduler_timescale",
        "test_cosine_with_min_lr": "lr_scheduler_min_lr_ratio",
    },
    # ------------------------------------------------------------ loss, noise and timesteps
    "golden/test_golden_training_math.py": {
        "test_losses": "loss_type huber_schedule",
    },
    "library/training/loss/test_losses.py": {
        "test_exponential_threshold_goes_from_one_to_c": "huber_schedule huber_scale",
        "test_threshold_is_c_times_its_scale": "huber_c huber_scale",
    },
    "library/training/loss/test_noise.py": {
        "test_offset_adds_one_number_to_each_channel": "noise_offset",
        "test_offset_random_strength_is_between_zero_and_the_offset": "noise_offset_random_strength",
        "test_adaptive_offset_follows_the_channel_mean": "adaptive_noise_scale",
        "test_multires_noise_is_smoother_and_has_deviation_one": "multires_noise_iterations multires_noise_discount",
        "test_input_noise": "ip_noise_gamma ip_noise_gamma_random_strength",
    },
    # ------------------------------------------------------------ validation
    "library/dataset/test_validation_split.py": {
        "test_split_of_a_folder": "validation_split",
        "test_seed_is_that_of_the_dataset_else_of_the_run_else_zero": "validation_seed",
    },
    "library/training/validating/test_validation_plan.py": {
        "test_after_every_epoch": "validate_every_n_epochs",
        "test_after_steps_as_well": "validate_every_n_steps",
    },
    "library/training/validating/test_validation.py": {
        "test_a_part_of_the_batches": "max_validation_steps",
        "test_the_best_lora_is_kept_with_its_loss": "save_best",
    },
    # ------------------------------------------------------------ saving and resuming
    "library/training/files/test_saving_names.py": {
        "test_names_of_the_reference": "output_dir output_name",
        "test_steps_are_saved_also_at_the_end": "save_every_n_steps",
        "test_epoch_ratio": "save_n_epoch_ratio",
        "test_old_epochs_make_way": "save_last_n_epochs save_last_n_epochs_state",
        "test_old_steps_make_way_by_steps_not_files": "save_last_n_steps save_last_n_steps_state",
    },
    "library/training/test_steps.py": {"test_where_a_run_begins": "initial_epoch initial_step skip_until_initial_step"},
    "library/training/files/test_metadata.py": {
        "test_modelspec_of_what_the_user_says": "metadata_title metadata_author metadata_description metadata_license "
        "metadata_tags metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase "
        "metadata_preprocessor metadata_is_negative_embedding",
    },
    # ------------------------------------------------------------ samples, logging, console, hub
    "library/sampling/test_pictures.py": {"test_is_due": "sample_every_n_steps sample_every_n_epochs sample_at_first"},
    "library/training/running/test_trackers.py": {
        "test_log_with": "log_with",
        "test_each_run_logs_into_a_folder_of_its_own": "logging_dir log_prefix",
        "test_the_project_has_a_name": "log_tracker_name",
        "test_settings_of_a_file_reach_the_tracker_and_the_flag_names_the_run": "log_tracker_config wandb_run_name",
        "test_wandb_gets_its_key_and_folder_by_variables_alone": "wandb_api_key",
        "test_the_options_are_sent_only_if_asked_for": "log_config",
    },
    "library/training/running/test_console.py": {
        "test_what_is_less_severe_is_not_shown": "console_log_level",
        "test_names_that_are_no_text_on_a_utf8_console_and_in_a_log_file": "console_log_file",
        "test_lines_tell_the_time_unless_they_are_to_be_simple": "console_log_simple",
    },
    "library/training/files/test_hub.py": {
        "test_a_run_uploads_what_it_saves": "huggingface_repo_id save_state_to_huggingface huggingface_path_in_repo async_upload",
        "test_a_missing_repository_is_made": "huggingface_repo_type huggingface_repo_visibility",
        "test_tokens_with_which_nothing_can_be_uploaded": "huggingface_token",
        "test_a_run_goes_on_from_a_state_of_the_hub_as_if_it_had_not_stopped": "resume_from_huggingface resume",
    },
}

# flag -> the word that stands for it in its tests
OTHER_WORDS = {
    "split_attn": "split",
    "llm_adapter_path": "llm_adapter",
    **{f"metadata_{name}": name for name in ("title", "author", "description", "license", "tags", "usage_hint", "merged_from",
                                             "trigger_phrase", "preprocessor", "is_negative_embedding")},
}  # fmt: skip

REFUSED: dict[str, tuple[str, str]] = {
    "dataset_class": ("--dataset_class=my.Dataset", "needs its dataset code, which is not here"),
    "offload_optimizer_nvme_path": (
        "--deepspeed --offload_optimizer_device=nvme --offload_optimizer_nvme_path=x",
        "DeepSpeed does that only in stage 3, which is not for a LoRA",
    ),
    "offload_param_device": ("--deepspeed --zero_stage=3 --offload_param_device=cpu", "--zero_stage=3 cannot be used"),
    "offload_param_nvme_path": ("--deepspeed --zero_stage=3 --offload_param_nvme_path=x", "--zero_stage=3 cannot be used"),
    "zero3_init_flag": ("--deepspeed --zero_stage=3 --zero3_init_flag", "--zero_stage=3 cannot be used"),
    "zero3_save_16bit_model": ("--deepspeed --zero_stage=3 --zero3_save_16bit_model", "--zero_stage=3 cannot be used"),
    "fp16_master_weights_and_gradients": (
        "--deepspeed --fp16_master_weights_and_gradients",
        "in fp16 the small steps of a LoRA are rounded away",
    ),
}

AIM_MET: dict[str, tuple[str, str]] = {
    "persistent_data_loader_workers": (
        "the threads that read images always live on from one epoch to the next",
        "library/dataset/test_loader.py::test_epochs_shorter_than_what_is_made_ahead",
    ),
    "lowram": (
        "weights are read tensor by tensor to where they will be",
        "library/anima/test_checkpoint.py::test_peak_memory_is_the_file_and_little_more",
    ),
    "disable_mmap_load_safetensors": (
        "no .safetensors file is ever mapped into memory",
        "library/files/test_safetensors_file.py::test_files_are_read_and_never_mapped_into_memory",
    ),
    "mem_eff_attn": (
        "PyTorch's own attention keeps no attention matrix; a warning says so",
        "library/options/test_anima.py::test_warned",
    ),
    "tokenizer_cache_dir": (
        "the tokenizers come with the project, and nothing is downloaded; a warning says so",
        "library/options/test_anima.py::test_warned",
    ),
    "ddp_gradient_as_bucket_view": (
        "gradients are views of the one buffer that is summed over processes",
        "library/training/optimizing/test_gradients.py::test_gradients_are_views_of_one_tensor",
    ),
    "ddp_static_graph": (
        "sums over processes do not depend on which weights took part in a step",
        "library/training/optimizing/test_gradients.py::test_a_weight_without_a_part_in_the_step",
    ),
}

EVERYWHERE = Effects(shown=SHOWN, refused=REFUSED, aim_met=AIM_MET)
