"""What ComfyUI does with a LoRA file (comfy/lora.py, comfy/weight_adapter/lora.py): for each weight of the loaded model it knows
some names of modules, and for each name it looks for pairs of endings; what nothing looks for is left out with a line in the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
)  # of those it looks for, the two we write


def denoiser_names(weights: Iterable[str]) -> dict[str, str]:
    """Name of a module -> the weight that it changes."""
    paths = {key: key.removesuffix(".weight") for key in weights}
    names = {f"lora_unet_{path.replace('.', '_')}": key for key, path in paths.items()}
    return names | {f"diffusion_model.{path}": key for key, path in paths.items()}


def encoder_names(weights: Iterable[str], *, inside: str, newer: bool) -> dict[str, str]:
    """Of a model's only text encoder, a language model; ``inside``: how the keys of its weights begin, "name.transformer.model.".
    Older versions know no lora_te_ names for it."""
    names = {}
    for key in weights:
        path = key.removesuffix(".weight")
        names[f"text_encoders.{path}"] = key
        if newer:
            names[f"lora_te_{path.removeprefix(inside).replace('.', '_')}"] = key
            names[path.partition(".")[2]] = key
    return names


def applied(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """What it adds to each weight, and the keys that it leaves out."""
    changes, left = {}, set(tensors)
    for name, weight in names.items():
        for up_ending, down_ending in PAIRS:
            up, down = tensors.get(name + up_ending), tensors.get(name + down_ending)
            if up is None or down is None:
                continue
            alpha = tensors.get(f"{name}.alpha")
            strength = 1.0 if alpha is None else float(alpha) / down.shape[0]
            assert weight not in changes
            changes[weight] = strength * up @ down
            left -= {name + up_ending, name + down_ending, f"{name}.alpha"}
    return changes, left
