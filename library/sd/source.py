"""Where the parts of a Stable Diffusion model are: in one file of the original layout, a diffusers folder, or such a folder on
the Hugging Face hub. Needs no torch, except for pickles.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import CheckpointError
from library.files.hub_download import fetch_model, is_repo_id
from library.files.json_text import read_model_settings
from library.files.model_path import find_model_file
from library.files.open_weights import WEIGHT_ENDINGS, open_weights
from library.files.weights_source import WeightsSource

MODEL_FLAG, VAE_FLAG = "--pretrained_model_name_or_path", "--vae"
MODEL_KIND = "Stable Diffusion checkpoint"
UNET, VAE, TEXT_ENCODERS = "unet", "vae", ("text_encoder", "text_encoder_2")  # folders in a diffusers folder
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
INDEX_FILE = "model_index.json"
# Weight files in a part's folder, by taste: whole before sharded, without a variant ("fp16") before with one
STEMS = r"(diffusion_pytorch_model|model|pytorch_model)"
TASTE = (
    rf"{STEMS}\.safetensors",
    rf"{STEMS}\.safetensors\.index\.json",
    rf"{STEMS}\.(?!non_ema)\w+\.safetensors",
    rf"{STEMS}\.safetensors\.index\.\w+\.json",
    rf"{STEMS}\.non_ema\.safetensors",
    rf"{STEMS}\.bin",
    rf"{STEMS}\.bin\.index\.json",
    rf"{STEMS}\.(?!non_ema)\w+\.bin",
    rf"{STEMS}\.bin\.index\.\w+\.json",
    rf"{STEMS}\.non_ema\.bin",
)
SHARD = re.compile(rf"{STEMS}(\.\w+)?-\d+-of-\d+(\.\w+)?\.(safetensors|bin)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A found model: one file, or a diffusers folder. ``name``: as the user wrote it."""

    name: str
    file: WeightsSource | None = None
    folder: Path | None = None

    def part(self, name: str) -> WeightsSource:
        """A part of a folder: ``unet``, ``vae``, ``text_encoder``, ``text_encoder_2``. Raises CheckpointError where it is not
        there."""
        assert self.folder is not None
        return folder_weights(self.folder / name, flag=MODEL_FLAG, whose=f"{self.name}/{name}")

    def settings(self, name: str) -> dict[str, Any]:
        """A JSON file of a folder; empty where it is not there. Raises CheckpointError where it is damaged."""
        assert self.folder is not None
        return read_model_settings(self.folder / name)

    def has_part(self, name: str) -> bool:
        return self.folder is not None and (self.folder / name).is_dir()


def find_model(value: str | None, *, parts: Collection[str], token: str | None = None) -> ModelSource:
    """The model that --pretrained_model_name_or_path names. ``parts``: the folders that are needed, if it is on the hub.

    Raises CheckpointError.
    """
    if value and is_remote(value):
        folder = fetch_model(value, lambda names: _files_of_model(names, parts), parts=parts, flag=MODEL_FLAG, token=token)
        return ModelSource(name=value, folder=folder)
    path = find_model_file(MODEL_FLAG, value, MODEL_KIND, allow_folder=True)
    if path.is_file():
        return ModelSource(name=str(path), file=open_weights(path, flag=MODEL_FLAG))
    if not (path / INDEX_FILE).is_file() and not (path / UNET).is_dir():
        raise CheckpointError(
            f"{MODEL_FLAG} {path} is no diffusers folder: it has neither {INDEX_FILE} nor {UNET}/{_models_in(path)}"
        )
    return ModelSource(name=str(path), folder=path)


def find_vae(value: str, *, token: str | None = None) -> WeightsSource:
    """The weights that --vae names: a file of any layout, a diffusers folder of a VAE or of a whole model, or either on the hub.

    Raises CheckpointError.
    """
    if is_remote(value):
        path = fetch_model(value, _files_of_vae, parts=(), flag=VAE_FLAG, token=token)
    else:
        path = find_model_file(VAE_FLAG, value, "VAE", allow_folder=True)
    if path.is_file():
        return open_weights(path, flag=VAE_FLAG)
    own = chosen_files(_names(path))
    return folder_weights(path if own or not (path / VAE).is_dir() else path / VAE, flag=VAE_FLAG, whose=value)


def is_remote(value: str) -> bool:
    """Whether this is OWNER/NAME on the hub, not a path; what ends as a weight file does is always a path."""
    return is_repo_id(value) and not Path(value).exists() and not value.endswith(WEIGHT_ENDINGS)


def folder_weights(folder: Path, *, flag: str, whose: str) -> WeightsSource:
    """The weights in one part's folder, of the file that is liked best. ``whose``: for messages. Raises CheckpointError."""
    names = _names(folder)
    chosen = chosen_files(names)
    if not chosen:
        there = f" (in it: {', '.join(names[:5])})" if names else ""
        what = "holds no weights of a diffusers model" if folder.is_dir() else "is not there"
        raise CheckpointError(f"{flag}: {whose} {what}{there}; give a whole diffusers folder")
    return open_weights(folder / chosen[0], flag=flag)


def chosen_files(names: Iterable[str]) -> list[str]:
    """Of the names in one part's folder: the weight file or index to open, and then the shards that belong to an index."""
    ordered = sorted(names)
    first = next((name for pattern in TASTE for name in ordered if re.fullmatch(pattern, name)), None)
    if first is None:
        return []
    return [first, *(name for name in ordered if _is_shard_of(name, first))]


def _is_shard_of(name: str, index: str) -> bool:
    """Shards of a variant are called ``stem.fp16-00001-of-00002.safetensors`` or ``stem-00001-of-00002.fp16.safetensors``."""
    listed = re.fullmatch(rf"{STEMS}\.(safetensors|bin)\.index(\.\w+)?\.json", index)
    shard = SHARD.fullmatch(name)
    if listed is None or shard is None:
        return False
    return (shard[1], shard[2] or shard[3], shard[4]) == (listed[1], listed[3], listed[2])


def _files_of_model(names: Sequence[str], parts: Collection[str]) -> Iterator[str]:
    """Of a repository's files: the weights and configs of ``parts``, and what says how the model was trained."""
    if not any(name == INDEX_FILE or name.startswith(f"{UNET}/") for name in names):
        return
    yield from (name for name in (INDEX_FILE, SCHEDULER_CONFIG) if name in names)
    for part in parts:
        yield from _files_in(names, f"{part}/")


def _files_of_vae(names: Sequence[str]) -> Iterator[str]:
    """The VAE's own repository has its files at the top, a whole model's in ``vae/``."""
    top = [name for name in names if "/" not in name]
    yield from _files_in(names, "" if chosen_files(top) else f"{VAE}/")


def _files_in(names: Sequence[str], start: str) -> Iterator[str]:
    here = [rest for name in names if name.startswith(start) and "/" not in (rest := name[len(start) :])]
    chosen = chosen_files(here)
    if chosen:
        yield from (start + name for name in (*chosen, *(["config.json"] if "config.json" in here else [])))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _models_in(folder: Path) -> str:
    found = [name for name in _names(folder) if name.endswith(WEIGHT_ENDINGS)]
    return f"; name a file in it: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else ""
