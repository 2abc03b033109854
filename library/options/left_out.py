"""Names that kohya-ss/sd-scripts, or programs that write config files for it, have or had, and training scripts here do not.

Its scripts take any key of a config file and heed those that they know, so that files in use hold keys that do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

_PROGRAM = "only programs that write config files know it"
_LAUNCHER = "it is for accelerate launch, before the script's name"
_FINE_TUNING = "it is for the training of whole models, not of a LoRA"
_NETWORK_ARGUMENT = "it works as an argument of --network_args, where the network module has it"
_TEXT_ENCODERS = (
    "it is for the training of whole models; a LoRA's text encoders are trained to the end, or not at all with "
    "--network_train_unet_only"
)
_CONVERSION = "it is for scripts that convert models; a LoRA is a .safetensors file unless --save_model_as says otherwise"

# name -> why it does nothing
LEFT_OUT = {
    **dict.fromkeys(("epoch", "noise_offset_type", "LoRA_type", "lowvram", "gpu_ids"), _PROGRAM),
    **dict.fromkeys(
        ("num_processes", "num_machines", "num_cpu_threads_per_process", "multi_gpu", "main_process_port",
         "extra_accelerate_launch_args", "dynamo_mode", "dynamo_use_fullgraph", "dynamo_use_dynamic"), _LAUNCHER),
    **dict.fromkeys(
        ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "train_text_encoder", "fused_optimizer_groups", "block_lr",
         "diffusers_xformers", "no_token_padding", "mem_eff_save"), _FINE_TUNING),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"), _NETWORK_ARGUMENT),
    "stop_text_encoder_training": _TEXT_ENCODERS,
    "use_safetensors": _CONVERSION,
}  # fmt: skip


def left_out_warning(place: str, keys: Iterable[str]) -> str:
    """One sentence about all such keys of the file ``place``."""
    return (
        f"{place}: left out: {', '.join(dict.fromkeys(keys))}; training scripts do not have that (those of kohya-ss/sd-scripts "
        "pass over it without a word)"
    )
