"""Runs of the real Stable Diffusion trainers on tiny checkpoints in this process: quicker than a script, and open to look into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.files.safetensors_file import read_header
from library.options.command_line import read_options
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.sd.architecture import STABLE_DIFFUSION
from library.sdxl.architecture import SDXL
from library.training.preflight import CheckedRun, check_run
from sdxl_train_network import SdxlNetworkTrainer
from tests.e2e.sd_runs import lora, model_flags, run_flags, write_dataset
from train_network import StableDiffusionTrainer

SD = (StableDiffusionTrainOptions, STABLE_DIFFUSION, StableDiffusionTrainer)
PARTS: dict[str, tuple[Any, Any, Any]] = {"sd1": SD, "sd2": SD, "sdxl": (SdxlTrainOptions, SDXL, SdxlNetworkTrainer)}


class SdRuns:
    """``runs.train("--max_train_steps=2", ...)`` runs the real ``train()`` of ``kind``; outputs are folders below ``folder``."""

    def __init__(self, kind: str, folder: Path, tiny_sd: Mapping[str, Path], pictures: Path):
        self.kind, self.folder, self.tiny_sd, self.pictures = kind, folder, tiny_sd, pictures
        self.options, self.architecture, self.trainer_class = PARTS[kind]
        self.write_dataset()

    def write_dataset(self, **settings: Any) -> None:
        write_dataset(self.folder / "my.toml", self.pictures, **settings)

    def checked(self, *arguments: object, output: str = "out") -> CheckedRun:
        flags = [*model_flags(self.kind, self.tiny_sd), *run_flags(self.folder / output, self.folder / "my.toml")]
        return check_run(read_options(self.options, [*flags, "--learning_rate=1e-3", *map(str, arguments)]), self.architecture)

    def train(self, *arguments: object, output: str = "out", trainer_class: Any = None) -> Any:
        trainer = (trainer_class or self.trainer_class)(self.checked(*arguments, output=output))
        trainer.train()
        return trainer

    def lora(self, output: str = "out", name: str = "tiny") -> dict[str, torch.Tensor]:
        return lora(self.folder / output / f"{name}.safetensors")

    def metadata(self, output: str = "out", name: str = "tiny") -> dict[str, str]:
        return read_header(self.folder / output / f"{name}.safetensors").metadata
