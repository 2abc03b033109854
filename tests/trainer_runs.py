"""Runs of the real trainers on tiny checkpoints in this process: quicker than a script, and open to look into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from library.files.safetensors_file import read_header, save_safetensors
from library.options.command_line import read_options
from library.options.declare import groups_of, options_of
from library.options.scripts import option_set_of
from library.training.preflight import CheckedRun, check_run
from tests.e2e.kinds import KINDS, lora, model_flags, run_flags, write_dataset
from tests.tiny_runs import same_tensors

CACHED_IN_MEMORY = ("--cache_latents", "--cache_text_encoder_outputs")
ONE_STEP = (*CACHED_IN_MEMORY, "--max_train_steps=1")
# script -> (where its architecture is, the trainer's class)
TRAINERS = {
    "anima_train_network.py": ("library.anima.architecture", "ANIMA", "AnimaNetworkTrainer"),
    "train_network.py": ("library.sd.architecture", "STABLE_DIFFUSION", "StableDiffusionTrainer"),
    "sdxl_train_network.py": ("library.sdxl.architecture", "SDXL", "SdxlNetworkTrainer"),
    "sd3_train_network.py": ("library.sd3.architecture", "SD3", "Sd3NetworkTrainer"),
    "lumina_train_network.py": ("library.lumina.architecture", "LUMINA", "LuminaNetworkTrainer"),
}


class Runs:
    """``runs.train("--max_train_steps=2", ...)`` runs the real ``train()`` of ``kind``; outputs are folders below ``folder``."""

    def __init__(self, kind: str, folder: Path, models: Mapping[str, Path], pictures: Path):
        self.kind, self.folder, self.models, self.pictures = kind, folder, models, pictures
        self.left_out: Sequence[str] = ()  # of the flags that name the model's files
        self.options = option_set_of(KINDS[kind].script)
        room, architecture, trainer = TRAINERS[KINDS[kind].script]
        self.architecture: Any = getattr(import_module(room), architecture)
        self.trainer_class: Any = getattr(import_module(KINDS[kind].script.removesuffix(".py")), trainer)
        self.write_dataset()

    def write_dataset(self, **settings: Any) -> None:
        write_dataset(self.folder / "my.toml", self.pictures, self.kind, **settings)

    def checked(self, *arguments: object, output: str = "out") -> CheckedRun:
        files = [flag for flag in model_flags(self.kind, self.models) if flag.partition("=")[0] not in self.left_out]
        flags = [*files, *run_flags(self.kind, self.folder / output, self.folder / "my.toml")]
        return check_run(read_options(self.options, [*flags, "--learning_rate=1e-3", *map(str, arguments)]), self.architecture)

    def train(self, *arguments: object, output: str = "out", trainer_class: Any = None) -> Any:
        trainer = (trainer_class or self.trainer_class)(self.checked(*arguments, output=output))
        trainer.train()
        return trainer

    def changes(self, *flags: object, base: Sequence[object] = ONE_STEP) -> bool:
        """Whether a run with ``flags`` trains other weights than one without them."""
        self.train(*base, output="plain")
        self.train(*base, *flags, output="changed")
        return not same_tensors(self.lora("plain"), self.lora("changed"))

    def drawn(self, *flags: object, prompt: str = "a red cat --w 64 --h 64 --s 3 --d 3") -> list[bytes]:
        """The pixels of the sample pictures before the first step, one for each line of ``prompt``."""
        prompts, output = self.folder / "prompts.txt", f"drawn {len(list(self.folder.glob('drawn*')))}"
        prompts.write_text(prompt, encoding="utf-8")
        alone = ("--cache_latents", "--max_train_steps=1", "--network_train_unet_only", "--sample_at_first")
        self.train(*alone, f"--sample_prompts={prompts}", *flags, output=output)
        return [pixels(path) for path in sorted((self.folder / output / "sample").iterdir())]

    def has(self, option: str) -> bool:
        return option in {one.name for group in groups_of(self.options).values() for one in options_of(group)}

    def lora(self, output: str = "out", name: str = "tiny") -> dict[str, torch.Tensor]:
        return lora(self.folder / output / f"{name}.safetensors")

    def metadata(self, output: str = "out", name: str = "tiny") -> dict[str, str]:
        return read_header(self.folder / output / f"{name}.safetensors").metadata


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def mask_left_halves(pictures: Path, masks: Path) -> Path:
    """A mask for each picture: white to the left of the middle. The pictures lose what would turn them."""
    masks.mkdir()
    for path in [path for path in pictures.iterdir() if path.suffix not in (".txt", ".json")]:
        with Image.open(path) as picture:
            plain = picture.convert("RGB")
        plain.getexif().clear()
        plain.save(path)
        mask = Image.new("L", plain.size)
        mask.paste(255, (0, 0, plain.width // 2, plain.height))
        mask.save(masks / f"{path.stem}.png")
    return masks


def caption_all(pictures: Path, text: str) -> None:
    for caption in pictures.glob("*.txt"):
        caption.write_text(text, encoding="utf-8")


def deep_denoiser(kind: str, models: Mapping[str, Path], path: Path, *, blocks: int) -> Path:
    """A file with the tiny denoiser of ``kind``, of so many blocks, and of SD3 with its VAE."""
    from tools import tiny_anima, tiny_lumina, tiny_sd3

    metadata: Mapping[str, str] = {"format": "pt"}
    if kind == "anima":
        tensors = tiny_anima.dit_tensors(replace(tiny_anima.SIZES["tiny"], blocks=blocks), seed=0)
    elif kind == "lumina":
        tensors = tiny_lumina.dit_weights(replace(tiny_lumina.sizes("tiny").nextdit, blocks=blocks), seed=0)
        metadata = read_header(models["dit"]).metadata
    else:
        name = KINDS[kind].files["--pretrained_model_name_or_path"]
        config = replace(tiny_sd3.tiny().mmdit, **tiny_sd3.KINDS[name], blocks=blocks)
        prefix = tiny_sd3.PREFIXES["mmdit"]
        others = {key: tensor for key, tensor in lora(models[name]).items() if not key.startswith(prefix)}
        made = tiny_sd3.mmdit_weights(config, seed=0)
        tensors = {**others, **{prefix + key: tensor for key, tensor in made.items()}}
        metadata = read_header(models[name]).metadata
    save_safetensors(path, tensors, dict(metadata))
    return path


def trained(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """lora_unet, lora_te1 ...: the models whose modules have learned."""
    return {"_".join(name.split("_")[:2]) for name, tensor in tensors.items() if "lora_up" in name and bool(tensor.any())}
