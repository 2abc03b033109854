"""Flags whose effect lies in Lumina's own code: see flag_effects.py, and flag_effects_flow.py for what flow models share."""

from __future__ import annotations

from tests.library.options.flag_effects import Effects

LUMINA = Effects(
    shown={
        "library/options/test_lumina.py": {"test_flags_that_name_a_kernel": "use_flash_attn"},
        "test_lumina_train_network.py": {
            "test_its_own_network_module": "network_module",
            "test_flags_of_the_text_train_otherwise": "gemma2_max_token_length system_prompt",
            "test_pictures_drawn_together_are_those_drawn_one_by_one": "sample_batch_size",
            "test_save_format_names_the_modules_as_diffusers_does": "save_format",
        },
        "library/lumina/test_architecture.py": {
            "test_a_path_on_the_command_line_wins": "pretrained_model_name_or_path gemma2 ae",
            "test_text_depends_on_encoder_precision_length_prompt_and_tokenizer": "gemma2_max_token_length system_prompt",
        },
        "library/lumina/test_tokenizer.py": {"test_what_is_named_wins": "gemma2_tokenizer"},
        "library/training/test_timestep_picture.py": {
            "test_picture_and_numbers": "model_prediction_type discrete_flow_shift",
            "test_the_sizes_of_the_pictures_count_where_the_sampling_asks_for_them": "timestep_sampling",
        },
        "library/training/loss/test_timesteps.py": {
            "test_sigmoid_scale_widens": "sigmoid_scale",
            "test_lumina_is_trained_with_a_shift_of_six": "discrete_flow_shift timestep_sampling",
        },
        "library/training/loss/test_objective.py": {
            "test_lumina_weighs_only_guesses_of_the_image": "weighting_scheme model_prediction_type",
        },
    },
    refused={
        "vae": ("--vae=vae.safetensors", "here the image coder is named by --ae; write --ae=vae.safetensors"),
        "use_sage_attn": ("--use_sage_attn", "the kernel has no backward pass"),
    },
)
