"""Runs of the real Anima trainer on tiny checkpoints in this process: quicker than a script, and open to look into."""

from __future__ import annotations

from pathlib import Path

import torch

from anima_train_network import AnimaNetworkTrainer
from library.anima.architecture import ANIMA
from library.files.safetensors_file import read_header, read_tensors
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.preflight import CheckedRun, check_run
from tests.e2e.anima_runs import model_flags, run_flags, write_dataset

CACHED_IN_MEMORY = ("--cache_latents", "--cache_text_encoder_outputs")


class AnimaRuns:
    """``runs.train("--max_train_steps=2", ...)`` runs the real ``train()``; outputs are folders below ``folder``."""

    def __init__(self, folder: Path, tiny_anima: dict[str, Path], pictures: Path):
        self.folder, self.tiny_anima, self.pictures = folder, tiny_anima, pictures
        self.write_dataset()

    def write_dataset(self, **subset: object) -> None:
        write_dataset(self.folder / "my.toml", self.pictures, **subset)  # type: ignore[arg-type]

    def checked(self, *arguments: object, output: str = "out") -> CheckedRun:
        flags = [*model_flags(self.tiny_anima), *run_flags(self.folder / output, self.folder / "my.toml"), "--learning_rate=1e-3"]
        return check_run(read_options(AnimaTrainOptions, [*flags, *map(str, arguments)]), ANIMA)

    def train(
        self, *arguments: object, output: str = "out", trainer_class: type[AnimaNetworkTrainer] = AnimaNetworkTrainer
    ) -> AnimaNetworkTrainer:
        trainer = trainer_class(self.checked(*arguments, output=output))
        trainer.train()
        return trainer

    def lora(self, output: str = "out", name: str = "tiny") -> dict[str, torch.Tensor]:
        return dict(read_tensors(read_header(self.folder / output / f"{name}.safetensors")))

    def metadata(self, output: str = "out", name: str = "tiny") -> dict[str, str]:
        return read_header(self.folder / output / f"{name}.safetensors").metadata
