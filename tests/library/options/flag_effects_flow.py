"""Flags whose effect lies in what all flow models share: Anima, SD3 and Lumina Image 2.0. See flag_effects.py."""

from __future__ import annotations

from tests.library.options.flag_effects import Effects

FLOW = Effects(
    shown={
        "test_trainers.py": {
            "test_the_denoiser_alone": "network_train_unet_only",
            "test_text_encoders_alone": "network_train_text_encoder_only",
            "test_rates_of_their_own": "text_encoder_lr unet_lr",
            "test_gradient_checkpointing_changes_nothing": "gradient_checkpointing cpu_offload_checkpointing",
            "test_swapped_blocks_change_nothing": "blocks_to_swap unsloth_offload_checkpointing",
            "test_weights_in_8_bits": "fp8_base",
            "test_compiled_runs_repeat_with_checkpointing_and_8_bits": "fp8_base_unet",
            "test_attention_kernels_that_need_no_package": "attn_mode split_attn sdpa",
            "test_compiled_blocks_train_alike": "torch_compile dynamo_backend",
        },
        "library/memory/test_block_swap.py": {"test_losses_and_gradients_are_those_without": "blocks_to_swap"},
        "library/training/models/test_model_memory.py": {
            "test_every_arrangement_gives_the_same_numbers": "unsloth_offload_checkpointing"
        },
        "library/training/loss/test_timesteps.py": {
            "test_logit_normal_mean_and_deviation": "logit_mean logit_std",
            "test_mode_scale_zero_is_uniform": "mode_scale",
            "test_timestep_bounds": "min_timestep max_timestep",
        },
        "library/training/test_timestep_picture.py": {"test_picture_and_numbers": "show_timesteps"},
    },
    refused={
        "v2": ("--v2", "cannot be used: it is about "),
        "clip_skip": ("--clip_skip=2", "cannot be used: it is about "),
        "max_token_length": ("--max_token_length=225", "cannot be used: it is about "),
        "weighted_captions": ("--weighted_captions", "cannot be used: it is about "),
        "v_parameterization": ("--v_parameterization", "is a flow model"),
        "zero_terminal_snr": ("--zero_terminal_snr", "is a flow model"),
        "min_snr_gamma": ("--min_snr_gamma=5", "is a flow model"),
        "scale_v_pred_loss_like_noise_pred": ("--scale_v_pred_loss_like_noise_pred", "is a flow model"),
        "v_pred_like_loss": ("--v_pred_like_loss=0.1", "is a flow model"),
        "debiased_estimation_loss": ("--debiased_estimation_loss", "is a flow model"),
    },
)

SD3_AND_LUMINA = Effects(
    shown={
        "library/options/test_flow_train.py": {"test_older_flags_name_a_kernel_too": "xformers sdpa"},
        "test_trainers.py": {
            "test_samplers_of_sample_pictures": "sample_sampler",
        },
    },
)
