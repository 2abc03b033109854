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
from library.randomness import torch_generator
from library.sd import clip_layout, unet_names, vae_layout
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
        pieces = vae_layout.vae_pieces(self.model.vae, vae_layout.ORIGINAL)
        save_safetensors(path, self._cast(file_tensors(self._vae(), pieces, matrices_as="convolution")))
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
        pieces = vae_layout.vae_pieces(model.vae, vae_layout.ORIGINAL)
        vae = file_tensors(self._vae(), pieces, matrices_as="convolution")
        tensors |= {VAE_PREFIX + key: tensor for key, tensor in vae.items()}
        for number, (prefix, layout, config) in enumerate(model.text):
            own = file_tensors(self._clip(number), clip_layout.clip_pieces(config, layout))
            tensors |= {prefix + key: tensor for key, tensor in (own | _beside_clip(config, layout)).items()}
        cast = self._cast(tensors)
        return cast | (noise_tables() if model.has_noise_tables else {}) | (velocity_marks() if self.v_prediction else {})

    def _unet(self) -> dict[str, Tensor]:
        """Under diffusers' names, in the shapes of files."""
        tensors = self._random("unet", unet_names.expected_shapes(self.model.unet))
        if not self.model.flat_projections:
            return tensors
        is_flat = (".proj_in.weight", ".proj_out.weight")
        return {name: tensor.flatten(1) if name.endswith(is_flat) else tensor for name, tensor in tensors.items()}

    def _vae(self) -> dict[str, Tensor]:
        """With latents that vary by about 1 once they are scaled, and posteriors that are narrow."""
        tensors = self._random("vae", vae_layout.module_shapes(self.model.vae))
        channels = self.model.vae.latent_channels
        tensors["quant_conv.weight"][:channels] /= self.model.latent_scale
        tensors["quant_conv.weight"][channels:] *= 0.1
        tensors["quant_conv.bias"][channels:] -= 6.0  # logarithm of the variance
        tensors["post_quant_conv.weight"] *= self.model.latent_scale
        tensors["decoder.conv_out.weight"] *= 0.5  # most colours within [-1, 1]
        return tensors

    def _clip(self, number: int) -> dict[str, Tensor]:
        return self._random(f"text{number}", clip_layout.expected_shapes(self.model.text[number][2]))

    def _random(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: _random(name, shape, part=part, seed=self.seed) for name, shape in shapes.items()}

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


# ---------------------------------------------------------------- weights


def _random(name: str, shape: tuple[int, ...], *, part: str, seed: int) -> Tensor:
    """Weights that keep a signal's size: norms near 1, biases small, matrices with 1/sqrt(inputs) times a gain."""
    import torch

    noise = torch.randn(shape, generator=torch_generator("tiny Stable Diffusion", seed, part, name))
    if name.endswith(".bias"):
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    if "embedding.weight" in name:  # a row for each token or position
        return noise if "token" in name else 0.3 * noise
    inputs = noise[0].numel()
    return noise * (_gain(name, part) / inputs**0.5)


def _gain(name: str, part: str) -> float:
    if part == "unet" and name.endswith(STREAM_WRITERS):
        return STREAM_SIZE
    if part == "unet" and name == "conv_out.weight":
        return 0.7  # the prediction starts with errors that a LoRA can take back
    if part.startswith("text") and name.endswith(("out_proj.weight", "fc2.weight")):
        return 0.3
    return 1.0


def report_lines(paths: Mapping[str, Path]) -> Iterator[str]:
    """``file: models/sd1_tiny.safetensors (9.8 MB)``"""
    for role, path in paths.items():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        yield f"{role}: {path} ({sum(file.stat().st_size for file in files) / 1e6:.1f} MB)"
