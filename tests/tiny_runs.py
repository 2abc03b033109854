"""Runs of the fake architecture in this process, and what tests read from what they leave."""

from __future__ import annotations

from pathlib import Path

import torch

from library.files.safetensors_file import read_header, read_tensors
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.preflight import CheckedRun, check_run
from tests.tiny_arch import TinyArchitecture, TinyTrainer

GENERAL = """[general]
resolution = 64
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
caption_extension = ".txt"
"""


class TinyRuns:
    """``runs.train("--max_train_steps=2", ...)`` runs the real ``train()`` over pictures/; outputs are folders below ``folder``."""

    def __init__(self, folder: Path, pictures: Path):
        self.folder, self.pictures = folder, pictures
        self.write_dataset()

    def write_dataset(self, *subsets: str, dataset: str = "batch_size = 2") -> None:
        """``subsets``: the lines of each; none: one subset of all pictures."""
        tables = [f"[[datasets.subsets]]\n{lines}\n" for lines in subsets or (self.images_of(self.pictures),)]
        (self.folder / "set.toml").write_text(f"{GENERAL}[[datasets]]\n{dataset}\n{''.join(tables)}", encoding="utf-8")

    @staticmethod
    def images_of(folder: Path, *lines: str) -> str:
        return "\n".join([f'image_dir = "{folder.as_posix()}"', *lines])

    def checked(self, *arguments: object, output: str = "out") -> CheckedRun:
        base = [
            "--pretrained_model_name_or_path=x",
            "--qwen3=x",
            "--vae=x",
            f"--dataset_config={self.folder / 'set.toml'}",
            f"--output_dir={self.folder / output}",
            "--output_name=t",
            "--network_module=networks.lora_anima",
            "--network_dim=2",
            "--learning_rate=1e-2",
            "--seed=1",
        ]
        return check_run(read_options(AnimaTrainOptions, [*base, *map(str, arguments)]), TinyArchitecture())

    def train(self, *arguments: object, output: str = "out", trainer_class: type[TinyTrainer] = TinyTrainer) -> TinyTrainer:
        trainer = trainer_class(self.checked(*arguments, output=output))
        trainer.train()
        return trainer

    def lora(self, output: str = "out", name: str = "t") -> dict[str, torch.Tensor]:
        return dict(read_tensors(read_header(self.folder / output / f"{name}.safetensors")))

    def metadata(self, output: str = "out", name: str = "t") -> dict[str, str]:
        return read_header(self.folder / output / f"{name}.safetensors").metadata


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
