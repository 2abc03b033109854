"""Tiny Stable Diffusion 3 and 3.5 checkpoints in the layouts of the real ones: MMDiT, CLIP-L, CLIP-G, T5 and VAE, in one file and
in several.

Token embeddings have the real vocabularies, so that the tokenizers that come with this project fit. What shapes cannot tell
stands in the header's ``config`` entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.files.safetensors_file import save_safetensors
from library.files.weights_source import file_tensors
from library.sd import clip_layout
from library.sd.clip_layout import GELU, ClipConfig
from library.sd.vae_layout import VaeConfig
from library.sd3 import layout, t5_layout
from library.sd3.layout import MmditConfig
from library.sd3.t5_layout import T5Config
from tools.tiny_weights import clip_weights, coder_weights, original_coder, random_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LATENT_CHANNELS, SCALE, SHIFT = 16, 1.5305, 0.0609  # of SD3's VAE
PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
# file -> the parts in it. "model" is what is published as SD3 and SD3.5; "clips" and "whole" add the text encoders
FILES = {
    "model": ("mmdit", "vae"),
    "clips": ("mmdit", "vae", "clip_l", "clip_g"),
    "whole": ("mmdit", "vae", "clip_l", "clip_g", "t5"),
    "clip_l": ("clip_l",),
    "clip_g": ("clip_g",),
    "t5xxl": ("t5",),
    "vae": ("vae",),
}
# layers that write into a residual stream: small enough that a stream keeps its size through all blocks. Those of attention need
# not be made smaller, as its results are means over many tokens: else texts would hardly count
STREAM_WRITERS = ("mlp.fc2.weight", "wo.weight")
SHARPNESS = 2.0  # of queries, so that attention is not a mean over all tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3Model:
    """The sizes of one model's parts."""

    mmdit: MmditConfig
    clip_l: ClipConfig
    clip_g: ClipConfig
    t5: T5Config
    vae: VaeConfig


def tiny() -> Sd3Model:
    mmdit = MmditConfig(width=128, blocks=3, heads=2, mlp_hidden=512, position_side=48)
    vae = VaeConfig(widths=(16, 32, 48, 48), latent_channels=LATENT_CHANNELS, norm_groups=8, quant=False)
    return _model(
        mmdit, vae, clip_widths=(16, 24), head_dim=8, t5=T5Config(width=48, layers=2, heads=3, head_dim=16, mlp_width=64)
    )


def bench() -> Sd3Model:
    """A part of the published widths, to measure with."""
    mmdit = MmditConfig(width=1024, blocks=4, heads=16, mlp_hidden=4096, position_side=64)
    vae = VaeConfig(widths=(32, 64, 96, 96), latent_channels=LATENT_CHANNELS, quant=False)
    return _model(mmdit, vae, clip_widths=(192, 256), head_dim=64, t5=T5Config(width=512, layers=4, heads=8, mlp_width=1024))


def _model(mmdit: MmditConfig, vae: VaeConfig, *, clip_widths: tuple[int, int], head_dim: int, t5: T5Config) -> Sd3Model:
    clip_l, clip_g = (
        ClipConfig(width=width, layers=3, heads=width // head_dim, mlp_width=2 * width, projection=width) for width in clip_widths
    )
    mmdit = replace(mmdit, pooled_width=sum(clip_widths), context_width=t5.width)
    return Sd3Model(mmdit=mmdit, clip_l=clip_l, clip_g=replace(clip_g, activation=GELU), t5=t5, vae=vae)


SIZES: dict[str, Callable[[], Sd3Model]] = {"tiny": tiny, "bench": bench}
# kind -> what its MMDiT has beyond that of SD3 medium
KINDS: dict[str, Mapping[str, Any]] = {
    "sd3": {},
    "sd35_medium": {"qk_norm": True, "dual_blocks": (0,)},
    "sd35_large": {"qk_norm": True},
}


def make_sd3(
    out_dir: Path,
    kind: str = "sd3",
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: str = "fp16",
    files: Iterable[str] = tuple(FILES),
) -> dict[str, Path]:
    """Writes ``files``, of ``FILES``, of one model of ``KINDS``; returns their paths by these names.

    Raises OutputError when the folder cannot be written. Equal arguments give equal bytes; a part has the same weights in every
    file, and what is not the MMDiT has them in every kind.
    """
    import torch

    number = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = SIZES[size]()
    model = replace(model, mmdit=replace(model.mmdit, **KINDS[kind]))
    parts = _parts(model, seed)
    paths = {}
    for file in files:
        names = FILES[file]
        alone = len(names) == 1
        paths[file] = Path(out_dir) / (f"{file}_{size}.safetensors" if alone else f"{kind}_{size}{_ending(file)}.safetensors")
        tensors = {("" if alone else PREFIXES[part]) + name: tensor for part in names for name, tensor in parts[part]().items()}
        config = {part: entry for part, entry in settings(model).items() if part in names}
        _save(paths[file], tensors, number, next(iter(config.values())) if alone and file != "vae" else config)
    return paths


def settings(model: Sd3Model) -> dict[str, dict[str, Any]]:
    """What shapes cannot tell, by part."""
    return {
        "mmdit": {"heads": model.mmdit.heads},
        "clip_l": {"heads": model.clip_l.heads, "activation": model.clip_l.activation},
        "clip_g": {"heads": model.clip_g.heads, "activation": model.clip_g.activation},
        "t5": {"heads": model.t5.heads},
        "vae": {"norm_groups": model.vae.norm_groups},
    }


def _ending(file: str) -> str:
    return {"model": "", "clips": "_incl_clips", "whole": "_incl_clips_t5xxl"}[file]


def _save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, config: Mapping[str, Any]) -> None:
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_safetensors(path, cast, {"format": "pt", "config": json.dumps(config)})


# ---------------------------------------------------------------- weights


def _parts(model: Sd3Model, seed: int) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """What makes each part's tensors, float32, under a file's names without prefix."""
    return {
        "mmdit": lambda: mmdit_weights(model.mmdit, seed=seed),
        "vae": lambda: original_coder(model.vae, coder_weights(model.vae, scale=SCALE, shift=SHIFT, seed=seed)),
        "clip_l": lambda: _clip_file(model.clip_l, part="text0", seed=seed),
        "clip_g": lambda: _clip_file(model.clip_g, part="text1", seed=seed),
        "t5": lambda: file_tensors(t5_weights(model.t5, seed=seed), t5_layout.t5_pieces(model.t5)),
    }


def mmdit_weights(config: MmditConfig, *, seed: int) -> dict[str, Tensor]:
    """Modulations and the last layer, which start at zero in training, have weights as others do."""
    tensors = random_weights(layout.expected_shapes(config), part="mmdit", seed=seed, gain=_gain)
    tensors["pos_embed"] = position_table(config.position_side, config.width)
    for name, tensor in tensors.items():
        if name.endswith("ln_q.weight" if config.qk_norm else "attn.qkv.weight"):
            tensor[: len(tensor) if config.qk_norm else config.width] *= SHARPNESS
    return tensors


def position_table(side: int, width: int) -> Tensor:
    """(1, side * side, width): sinusoids of column and row, each sines and then cosines. A patch is a third of a unit, as
    diffusers makes the table of 192 patches."""
    import torch

    places = torch.arange(side, dtype=torch.float64) / 3
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = places[:, None] * frequencies  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, width).float()


def t5_weights(config: T5Config, *, seed: int) -> dict[str, Tensor]:
    """Under the names of the module. T5 does not divide the products of queries and keys: the weights have to."""
    tensors = random_weights(t5_layout.expected_shapes(config), part="t5", seed=seed, gain=_gain)
    tensors[t5_layout.EMBEDDING] *= config.width**0.5  # a row for each token, whose numbers vary by 1
    tensors[t5_layout.BIAS] *= config.heads**0.5
    for name in tensors:
        if name.endswith("SelfAttention.q.weight"):
            tensors[name] /= config.head_dim**0.5
    return tensors


def _clip_file(config: ClipConfig, *, part: str, seed: int) -> dict[str, Tensor]:
    import torch

    tensors = file_tensors(clip_weights(config, part=part, seed=seed), clip_layout.clip_pieces(config, "hf"))
    return tensors | {"logit_scale": torch.tensor(4.6)}  # which files have, and no one needs


def _gain(name: str) -> float:
    """How large a matrix's results are, of inputs of size 1."""
    if name.endswith(STREAM_WRITERS):
        return 0.3
    if "adaLN_modulation" in name:
        return 0.5
    return 0.7 if name == "final_layer.linear.weight" else 1.0  # errors that a LoRA can take back
