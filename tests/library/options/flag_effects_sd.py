"""Flags whose effect lies in the code of Stable Diffusion 1, 2 and XL: see flag_effects.py."""

from __future__ import annotations

from tests.library.options.flag_effects import Effects

BOTH = Effects(
    shown={
        "library/options/test_sd.py": {"test_commands_of_the_guides": "xformers"},
        "test_sd_flags.py": {
            "test_max_token_length_lets_in_the_end_of_a_long_caption": "max_token_length",
            "test_weighted_captions_count_cached_or_not": "weighted_captions",
            "test_flags_of_the_noise_levels_reach_the_training": "zero_terminal_snr min_snr_gamma v_pred_like_loss "
            "debiased_estimation_loss scale_v_pred_loss_like_noise_pred v_parameterization min_timestep max_timestep",
            "test_flags_of_noise_and_loss_all_train_otherwise": "noise_offset noise_offset_random_strength adaptive_noise_scale "
            "multires_noise_iterations multires_noise_discount ip_noise_gamma ip_noise_gamma_random_strength loss_type "
            "huber_schedule",
            "test_another_vae_makes_other_latents": "vae",
            "test_no_half_vae_encodes_in_float32": "no_half_vae",
            "test_8_bits_of_the_denoiser_alone_or_of_the_text_encoders_too": "fp8_base fp8_base_unet",
            "test_attention_that_needs_no_package_differs_by_rounding_at_most": "sdpa attn_mode split_attn",
            "test_full_bf16_keeps_the_lora_in_16_bits": "full_bf16",
            "test_a_network_module_of_somebody_else": "network_module",
            "test_save_format_names_the_modules_as_diffusers_does": "save_format",
            "test_sampler_of_sample_pictures": "sample_sampler",
        },
        "library/sd/test_architecture.py": {
            "test_a_named_vae_wins_over_the_bundled_one": "vae",
            "test_marks_of_velocity_want_their_flags": "v_parameterization zero_terminal_snr",
        },
        "library/training/test_timestep_picture.py": {
            "test_picture_and_numbers": "show_timesteps min_snr_gamma v_parameterization",
        },
        "library/training/loss/test_ddpm.py": {
            "test_all_timesteps_of_the_range_are_drawn_alike": "min_timestep max_timestep",
            "test_the_last_level_of_zero_terminal_snr_is_noise_alone": "zero_terminal_snr",
            "test_min_snr_lowers_the_weight_of_low_noise_only": "min_snr_gamma",
            "test_weights_multiply": "v_pred_like_loss debiased_estimation_loss",
        },
        "test_trainers.py": {
            "test_cold_warm_and_live_train_on_the_same_values": "network_train_unet_only cache_latents_to_disk "
            "cache_text_encoder_outputs_to_disk",
            "test_rates_of_their_own": "text_encoder_lr unet_lr",
            "test_gradient_checkpointing_changes_nothing": "gradient_checkpointing cpu_offload_checkpointing",
            "test_text_encoders_alone": "network_train_text_encoder_only",
            "test_compiled_blocks_train_alike": "torch_compile dynamo_backend",
        },
        "test_sd_train_network.py": {
            "test_folder_and_pickle_train_as_the_single_file_does": "pretrained_model_name_or_path",
            "test_velocity_is_another_target": "v_parameterization",
        },
    },
)

SD = Effects(
    shown={
        "test_sd_flags.py": {"test_clip_skip_acts_where_it_is_said_to": "clip_skip"},
        "library/sd/test_metadata.py": {"test_versions": "v2"},
        "library/sd/test_architecture.py": {
            "test_versions_and_their_flag": "v2",
            "test_clip_skip_beyond_the_layers": "clip_skip",
        },
        "library/sd/test_text.py": {"test_clip_skip_leaves_layers_out": "clip_skip"},
    },
)

SDXL = Effects(
    shown={
        "test_sd_flags.py": {
            "test_rates_of_two_text_encoders_by_list_or_by_flags_of_their_own": "text_encoder_lr text_encoder_lr1 "
            "text_encoder_lr2",
            "test_clip_skip_of_sample_pictures_is_that_of_the_training": "clip_skip",
        },
    },
    refused={"v2": ("--v2", "it says that a checkpoint is Stable Diffusion 2.x")},
)
