"""Flags whose effect lies in SD3's own code: see flag_effects.py, and flag_effects_flow.py for what flow models share."""

from __future__ import annotations

from tests.library.options.flag_effects import Effects

SD3 = Effects(
    shown={
        "test_sd3_train_network.py": {
            "test_two_network_modules_train_alike": "network_module",
            "test_flags_of_the_text_train_otherwise": "t5xxl_max_token_length apply_lg_attn_mask apply_t5_attn_mask "
            "clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate",
            "test_flags_of_the_positions_train_otherwise": "pos_emb_random_crop_rate enable_scaled_pos_embed",
            "test_t5_works_where_and_as_it_is_told": "t5xxl_device t5xxl_dtype",
            "test_save_format_names_the_modules_as_diffusers_does": "save_format",
        },
        "library/sd3/test_architecture.py": {
            "test_text_encoders_in_files_of_their_own": "clip_l clip_g t5xxl",
            "test_a_path_wins_over_what_is_bundled": "pretrained_model_name_or_path clip_l clip_g t5xxl vae",
            "test_text_depends_on_encoders_lengths_and_masks": "t5xxl_max_token_length apply_lg_attn_mask apply_t5_attn_mask "
            "t5xxl_dtype",
        },
        "library/training/test_timestep_picture.py": {"test_picture_and_numbers": "training_shift"},
        "library/training/loss/test_timesteps.py": {
            "test_timesteps_of_sd3_are_whole_numbers_in_their_range": "min_timestep max_timestep training_shift mode_scale",
            "test_a_number_of_sd3s_density_is_the_noise_level": "weighting_scheme logit_mean",
        },
    },
    aim_met={
        "save_clip": (
            "training a LoRA leaves the CLIPs as they are, in the files they came from; a warning says so",
            "library/options/test_sd3.py::test_warned",
        ),
        "save_t5xxl": (
            "training a LoRA leaves the T5 as it is, in the file it came from; a warning says so",
            "library/options/test_sd3.py::test_warned",
        ),
    },
)
