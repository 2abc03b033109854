"""The models that the same tests are run for: their scripts, and how a command line names their tiny checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.anima_runs import lora, same_lora
from tests.e2e.anima_runs import write_dataset as write

__all__ = ["ALL", "CACHED", "KINDS", "Kind", "lora", "model_flags", "over", "run_flags", "same_lora", "write_dataset"]

CACHED = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of model as users train it."""

    script: str
    fixture: str  # of its checkpoints: flag -> path's name there is ``files``
    files: Mapping[str, str]
    flags: Sequence[str] = ()  # besides the files
    network: str
    text_prefixes: tuple[str, ...]  # of the text encoders' LoRAs, in the order of --text_encoder_lr
    version: str  # ss_base_model_version
    smallest_side: int = 32  # pixels
    bucket_step: int = 16


def _sd(kind: str, script: str, version: str, prefixes: tuple[str, ...], *flags: str) -> Kind:
    return Kind(
        script=script,
        fixture="tiny_sd",
        files={"--pretrained_model_name_or_path": kind},
        flags=flags,
        network="networks.lora",
        text_prefixes=prefixes,
        version=version,
        smallest_side=64,
        bucket_step=64,
    )


def _sd3(name: str, version: str) -> Kind:
    return Kind(
        script="sd3_train_network.py",
        fixture="tiny_sd3",
        files={"--pretrained_model_name_or_path": name, "--clip_l": "clip_l", "--clip_g": "clip_g", "--t5xxl": "t5xxl"},
        network="networks.lora_sd3",
        text_prefixes=("lora_te1", "lora_te2"),
        version=version,
    )


KINDS = {
    "anima": Kind(
        script="anima_train_network.py",
        fixture="tiny_anima",
        files={"--pretrained_model_name_or_path": "dit", "--qwen3": "qwen3", "--vae": "vae"},
        network="networks.lora_anima",
        text_prefixes=("lora_te",),
        version="anima",
    ),
    "sd1": _sd("sd1", "train_network.py", "sd_v1", ("lora_te",)),
    "sd2": _sd("sd2", "train_network.py", "sd_v2", ("lora_te",), "--v2"),
    "sdxl": _sd("sdxl", "sdxl_train_network.py", "sdxl_base_v1-0", ("lora_te1", "lora_te2")),
    "sd3": _sd3("sd3", "medium"),
    "sd35m": _sd3("sd35_medium", "5-medium"),
    "sd35l": _sd3("sd35_large", "5-large"),
    "lumina": Kind(
        script="lumina_train_network.py",
        fixture="tiny_lumina",
        files={"--pretrained_model_name_or_path": "dit", "--gemma2": "gemma2", "--ae": "ae"},
        network="networks.lora_lumina",
        text_prefixes=("lora_te",),
        version="lumina2",
    ),
}
ALL = tuple(KINDS)


def over(*kinds: str, slow: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrises ``kind``; those of ``slow`` run with the slow tests only."""
    return pytest.mark.parametrize("kind", [*kinds, *(pytest.param(kind, marks=pytest.mark.slow) for kind in slow)])


def write_dataset(path: Path, images: Path, kind: str, **settings: Any) -> Path:
    """Pictures around 64 pixels."""
    own = KINDS[kind]
    return write(path, images, **{"smallest_side": own.smallest_side, "bucket_step": own.bucket_step, **settings})


def model_flags(kind: str, models: Mapping[str, Path]) -> list[str]:
    return [*(f"{flag}={models[name]}" for flag, name in KINDS[kind].files.items()), *KINDS[kind].flags]


def run_flags(kind: str, output: Path, dataset: Path) -> list[str]:
    return [
        f"--dataset_config={dataset}",
        f"--output_dir={output}",
        "--output_name=tiny",
        f"--network_module={KINDS[kind].network}",
        "--network_dim=4",
        "--seed=5",
    ]
