"""Command lines and checks that the end-to-end tests of Anima share."""

from __future__ import annotations

from pathlib import Path

import torch

from library.files.safetensors_file import read_header, read_tensors

SCRIPT = "anima_train_network.py"


def write_dataset(  # noqa: PLR0913  # what a dataset has
    path: Path,
    images: Path,
    *,
    resolution: int = 64,
    batch_size: int = 2,
    smallest_side: int = 32,
    bucket_step: int = 16,
    **subset: object,
) -> Path:
    """A dataset file with one subset; further keys go into the subset."""
    keys = "\n".join(f"{key} = {toml_value(value)}" for key, value in subset.items())
    path.write_text(
        f"""[general]
resolution = {resolution}
enable_bucket = true
min_bucket_reso = {smallest_side}
max_bucket_reso = {resolution * 2}
bucket_reso_steps = {bucket_step}
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


def toml_value(value: object) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(one)}' for key, one in value.items())} }}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def model_flags(tiny_anima: dict[str, Path]) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={tiny_anima['dit']}",
        f"--qwen3={tiny_anima['qwen3']}",
        f"--vae={tiny_anima['vae']}",
    ]


def run_flags(output: Path, dataset: Path) -> list[str]:
    return [
        f"--dataset_config={dataset}",
        f"--output_dir={output}",
        "--output_name=tiny",
        "--network_module=networks.lora_anima",
        "--network_dim=4",
        "--seed=5",
    ]


CACHED = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]


def lora(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(read_header(path)))


def same_lora(first: Path, second: Path) -> bool:
    """Byte for byte the same weights; metadata holds times and may differ."""
    a, b = lora(first), lora(second)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
