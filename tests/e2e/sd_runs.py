"""Command lines that the end-to-end tests of Stable Diffusion 1, 2 and XL share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.e2e import anima_runs
from tests.e2e.anima_runs import lora, same_lora

__all__ = ["CACHED", "KINDS", "SCRIPTS", "VERSION_FLAGS", "lora", "model_flags", "run_flags", "same_lora", "write_dataset"]

KINDS = ("sd1", "sd2", "sdxl")
SCRIPTS = {"sd1": "train_network.py", "sd2": "train_network.py", "sdxl": "sdxl_train_network.py"}
VERSION_FLAGS: dict[str, list[str]] = {"sd1": [], "sd2": ["--v2"], "sdxl": []}
CACHED = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]


# pictures around 64 px
write_dataset = partial(anima_runs.write_dataset, smallest_side=64, bucket_step=64)


def model_flags(kind: str, tiny_sd: Mapping[str, Path]) -> list[str]:
    return [f"--pretrained_model_name_or_path={tiny_sd[kind]}", *VERSION_FLAGS[kind]]


def run_flags(output: Path, dataset: Path) -> list[str]:
    return [
        f"--dataset_config={dataset}",
        f"--output_dir={output}",
        "--output_name=tiny",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--seed=5",
    ]
