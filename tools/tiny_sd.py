"""Tiny Stable Diffusion checkpoints in the layouts of the real ones: single files (.safetensors, .ckpt), diffusers folders, VAEs.

The blocks are those of the published models (SD: 12 down, 1 middle, 12 up; SDXL: 9, 1, 9), only narrow; the text encoders have
the real vocabulary, so that the tokenizers that come with this project fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.files.atomic import write_atomically, write_text_atomically
from library.files.safetensors_file import save_safetensors
from library.files.weights_source import Piece, file_tensors
from library.sd import clip_layout, unet_names
from library.sd.clip_layout import ClipConfig
from library.sd.unet_layout import PREFIX as UNET_PREFIX
from library.sd.unet_names import UNetConfig
from tools.tiny_sd_models import (
    MODELS,
    SdModel,
    config_entry,
    diffusers_unet_config,
    diffusers_vae_config,
    model_index,
    scheduler_config,
    transformers_config,
)
from tools.tiny_weights import clip_weights, coder_weights, original_coder, random_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VAE_PREFIX = "first_stage_model."
LAYOUTS = ("file", "ckpt", "folder", "vae", "vae_diffusers")
# Layers that write into the U-Net's stream, and the size of what they write. The stream is normalised wherever it is read, so a
# small one changes no output, but lets the small steps of a usual LoRA learning rate move it within 200 steps.
STREAM_WRITERS = ("conv_in.weight", "conv2.weight", ".proj_in.weight", ".to_out.0.weight", ".ff.net.2.weight")
STREAM_SIZE = 0.05


def make_sd(  # noqa: PLR0913  # what to write
    out_dir: Path,
    kind: str,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: str = "fp16",
    layouts: Sequence[str] = ("file",),
    v_prediction: bool = False,
) -> dict[str, Path]:
    """Writes one model ("sd1", "sd2" or "sdxl") in each of ``layouts``; returns the paths by layout, of ``LAYOUTS``.

    ``v_prediction``: marked as a model that predicts velocity under a terminal signal of zero. Raises OutputError when the folder
    cannot be written. Equal arguments give equal bytes, and every layout has the same weights.
    """
    import torch

    number = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    writer = _Writer(MODELS[kind][size](), Path(out_dir), f"{kind}_{size}", seed, number, v_prediction)
    return {layout: getattr(writer, f"write_{layout}")() for layout in layouts}


@dataclass(frozen=True, slots=True)
class _Writer:
    """Each method writes one layout and returns its path."""

    model: SdModel
    folder: Path
    name: str
    seed: int
    dtype: torch.dtype
    v_prediction: bool

    def write_file(self) -> Path:
        path = self.folder / f"{self.name}.safetensors"
        save_safetensors(path, self._single_file(), {"format": "pt", "config": json.dumps(config_entry(self.model))})
        return path

    def write_ckpt(self) -> Path:
        import torch

        path = self.folder / f"{self.name}.ckpt"
        content = {"epoch": 0, "global_step": 1, "state_dict": self._single_file()}
        write_atomically(path, lambda file: torch.save(content, file))
        return path

    def write_vae(self) -> Path:
        path = self.folder / f"vae_{self.name}.safetensors"
        save_safetensors(path, self._cast(original_coder(self.model.vae, self._vae())))
        return path

    def write_vae_diffusers(self) -> Path:
        folder = self.folder / f"vae_{self.name}"
        self._write_model(folder, "diffusion_pytorch_model", self._vae(), diffusers_vae_config(self.model))
        return folder

    def write_folder(self) -> Path:
        folder, model = self.folder / self.name, self.model
        self._write_model(folder / "unet", "diffusion_pytorch_model", self._unet(), diffusers_unet_config(model))
        self._write_model(folder / "vae", "diffusion_pytorch_model", self._vae(), diffusers_vae_config(model))
        for number, (_, _, config) in enumerate(model.text):
            place = folder / ("text_encoder" if number == 0 else f"text_encoder_{number + 1}")
            kept = self._kept_clip(number)
            pieces = clip_layout.clip_pieces(kept, "hf")
            self._write_model(place, "model", file_tensors(self._clip(number), pieces), transformers_config(kept))
            assert config.width == kept.width
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(v_prediction=self.v_prediction))
        _write_json(folder / "model_index.json", model_index(model))
        return folder

    def _kept_clip(self, number: int) -> ClipConfig:
        """The encoder as diffusers' folders hold it: that of SD 2 without its last layer, and without a projection."""
        _, layout, config = self.model.text[number]
        if layout == "open_clip" and not self.model.unet.vector_width:
            return replace(config, layers=config.layers - 1, projection=None)
        return config

    def _single_file(self) -> dict[str, Tensor]:
        model = self.model
        unet = file_tensors(self._unet(), {name: Piece(key) for name, key in _unet_names(model.unet).items()})
        tensors = {UNET_PREFIX + key: tensor for key, tensor in unet.items()}
        tensors |= {VAE_PREFIX + key: tensor for key, tensor in original_coder(model.vae, self._vae()).items()}
        for number, (prefix, layout, config) in enumerate(model.text):
            own = file_tensors(self._clip(number), clip_layout.clip_pieces(config, layout))
            tensors |= {prefix + key: tensor for key, tensor in (own | _beside_clip(config, layout)).items()}
        cast = self._cast(tensors)
        return cast | (noise_tables() if model.has_noise_tables else {}) | (velocity_marks() if self.v_prediction else {})

    def _unet(self) -> dict[str, Tensor]:
        """Under diffusers' names, in the shapes of files."""
        tensors = random_weights(unet_names.expected_shapes(self.model.unet), part="unet", seed=self.seed, gain=unet_gain)
        if not self.model.flat_projections:
            return tensors
        is_flat = (".proj_in.weight", ".proj_out.weight")
        return {name: tensor.flatten(1) if name.endswith(is_flat) else tensor for name, tensor in tensors.items()}

    def _vae(self) -> dict[str, Tensor]:
        return coder_weights(self.model.vae, scale=self.model.latent_scale, seed=self.seed)

    def _clip(self, number: int) -> dict[str, Tensor]:
        return clip_weights(self.model.text[number][2], part=f"text{number}", seed=self.seed)

    def _cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def _write_model(self, folder: Path, stem: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        save_safetensors(folder / f"{stem}.safetensors", self._cast(tensors), {"format": "pt"})
        _write_json(folder / "config.json", config)


def noise_tables() -> dict[str, Tensor]:
    """Two of the tables that published single files hold beside the weights."""
    import torch

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float()}


def velocity_marks() -> dict[str, Tensor]:
    """The empty tensors by which single files say what the U-Net predicts."""
    import torch

    return {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


def _beside_clip(config: ClipConfig, layout: str) -> dict[str, Tensor]:
    """What files hold of an encoder that is not loaded."""
    import torch

    if layout == "open_clip":
        return {"logit_scale": torch.tensor(4.6)}
    return {"text_model.embeddings.position_ids": torch.arange(config.positions).unsqueeze(0)}


def _unet_names(config: UNetConfig) -> dict[str, str]:
    """diffusers' name of each tensor -> the original one."""
    modules = unet_names.original_names(config)
    paths = ((name, *name.rpartition(".")[::2]) for name in unet_names.expected_shapes(config))
    return {name: f"{modules[module]}.{leaf}" for name, module, leaf in paths}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def unet_gain(name: str) -> float:
    """How large a matrix's results are, of inputs of size 1."""
    if name.endswith(STREAM_WRITERS):
        return STREAM_SIZE
    return 0.7 if name == "conv_out.weight" else 1.0  # the prediction starts with errors that a LoRA can take back


def report_lines(paths: Mapping[str, Path]) -> Iterator[str]:
    """``file: models/sd1_tiny.safetensors (9.8 MB)``"""
    for role, path in paths.items():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        yield f"{role}: {path} ({sum(file.stat().st_size for file in files) / 1e6:.1f} MB)"
