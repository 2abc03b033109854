"""Command lines that the end-to-end tests of Stable Diffusion 1, 2 and XL share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.e2e.anima_runs import lora, same_lora, toml_value

__all__ = ["CACHED", "KINDS", "SCRIPTS", "VERSION_FLAGS", "lora", "model_flags", "run_flags", "same_lora", "write_dataset"]

KINDS = ("sd1", "sd2", "sdxl")
SCRIPTS = {"sd1": "train_network.py", "sd2": "train_network.py", "sdxl": "sdxl_train_network.py"}
VERSION_FLAGS: dict[str, list[str]] = {"sd1": [], "sd2": ["--v2"], "sdxl": []}
CACHED = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]


def write_dataset(path: Path, images: Path, *, batch_size: int = 2, **subset: object) -> Path:
    """A dataset file with one subset of pictures around 64 px; further keys go into the subset."""
    keys = "\n".join(f"{key} = {toml_value(value)}" for key, value in subset.items())
    path.write_text(
        f"""[general]
resolution = 64
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
bucket_reso_steps = 64
caption_extension = ".txt"

[[datasets]]
batch_size = {batch_size}

[[datasets.subsets]]
image_dir = "{images.as_posix()}"
{keys}
""",
        encoding="utf-8",
    )
    return path


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
