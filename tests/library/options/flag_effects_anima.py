"""Flags whose effect lies in Anima's own code: see flag_effects.py, and flag_effects_flow.py for what flow models share."""

from __future__ import annotations

from tests.library.options.flag_effects import Effects

SHOWN: dict[str, dict[str, str]] = {
    "library/options/test_anima.py": {"test_older_flags_name_a_kernel_too": "xformers sdpa"},
    "e2e/test_anima_training.py": {
        "test_folders_named_with_repeats": "train_data_dir train_batch_size max_train_epochs network_module",
    },
    "networks/test_lora_anima.py": {
        "test_dropouts_reach_the_modules": "network_dropout",
        "test_parts_have_groups_of_their_own": "self_attn_lr cross_attn_lr mlp_lr",
        "test_mod_lr_lets_in_the_modulation_of_the_blocks_alone": "mod_lr",
        "test_llm_adapter_lr_trains_the_adapter": "llm_adapter_lr",
    },
    "test_anima_networks.py": {
        "test_parts_train_at_their_rates": "self_attn_lr mod_lr llm_adapter_lr",
    },
    "test_anima_train_network.py": {
        "test_an_attention_kernel_that_does_not_work_here_is_told_before_anything_is_loaded": "attn_mode",
        "test_a_backend_that_is_not_there_is_told_before_anything_is_loaded": "dynamo_backend",
    },
    "test_anima_fp8.py": {"test_training_differs_slightly_and_resumes_exactly": "fp8_base fp8_base_unet"},
    "e2e/test_anima_lora_layouts.py": {"test_diffusers_files_are_saved_and_gone_on_from_in_comfyui_s": "save_format"},
    "e2e/test_interruption.py": {"test_a_signal_saves_and_the_run_goes_on": "resume"},
    "e2e/test_anima_inference.py": {"test_samples_of_a_training_come_out_again": "sample_sampler sample_at_first"},
    "library/anima/test_architecture.py": {
        "test_only_the_parts_that_are_asked_for_are_read": "pretrained_model_name_or_path qwen3 vae",
        "test_tokens_are_counted_without_any_model_file": "qwen3_max_token_length t5_max_token_length",
        "test_tokens_are_counted_by_the_tokenizers_of_the_run": "t5_tokenizer_path",
    },
    "library/anima/test_checkpoint.py": {"test_given_adapter_is_the_one_loaded": "llm_adapter_path"},
    "library/anima/test_vae.py": {"test_chunked_equals_unchunked": "vae_chunk_size"},
    "library/training/loss/test_timesteps.py": {
        "test_sigmoid_scale_widens": "sigmoid_scale",
        "test_shift_moves_towards_noise": "discrete_flow_shift",
    },
    "golden/test_golden_training_math.py": {
        "test_every_sampling_case": "timestep_sampling weighting_scheme",
        "test_loss_weighting": "weighting_scheme",
    },
}

AIM_MET: dict[str, tuple[str, str]] = {
    "vae_disable_cache": (
        "there is one frame, so that no cache of earlier frames is ever kept",
        "library/anima/test_vae.py::test_disabled_cache_changes_nothing",
    ),
}

ANIMA = Effects(shown=SHOWN, aim_met=AIM_MET)
