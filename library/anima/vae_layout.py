"""What a Qwen-Image VAE file holds: sizes, key names, latent statistics. Reads headers only and needs no torch.

Two layouts are in circulation, with equal weights: the published single file (Wan names: ``encoder.downsamples.3.residual.2``,
``conv1``) and the diffusers folder (``encoder.down_blocks.3.conv1``, ``quant_conv``). Both are renamed to the names of
``library/anima/vae.py``: ``encoder.blocks.3.conv1``, ``quant_conv``; ``blocks`` counts residual and resampling layers together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.errors import CheckpointError
from library.files.key_check import key_problems, shape_problem
from library.files.model_path import QWEN_IMAGE_VAE, find_model_file, recognise_keys, with_article
from library.files.safetensors_file import SafetensorsHeader, read_header

FLAG = "--vae"
STRIDE = 8  # pixels per latent; the whole project counts on it
PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
FOLDER_FILES = ("diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")

# per-channel statistics of the published model's raw latents
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916)  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]

RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}  # places in the Wan file's Sequential
TOP_LEVEL = {"conv1": "quant_conv", "conv2": "post_quant_conv", "quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
ENDS = {"conv1": "conv_in", "conv_in": "conv_in", "head.0": "norm_out", "norm_out": "norm_out", "head.2": "conv_out",
        "conv_out": "conv_out"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Sizes of one VAE; ``stem`` 96, ``widths`` (96, 192, 384, 384), ``blocks`` 2, 16 latent channels as published."""

    stem: int  # channels after the encoder's first convolution
    widths: tuple[int, ...]  # channels of each level of the encoder, from full resolution down
    blocks: int  # residual blocks per level of the encoder; the decoder has one more
    latent_channels: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def stride(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True, slots=True)
class VaeLayout:
    """A checked VAE file. ``header`` and ``config`` are None for a pickle file, whose content is only known once loaded."""

    path: Path
    header: SafetensorsHeader | None
    config: VaeConfig | None
    names: dict[str, str]  # key in the file -> name in the module, for the tensors that are loaded

    @property
    def known_config(self) -> VaeConfig:
        assert self.config is not None, "the sizes of a pickle file are known only after loading"
        return self.config


def read_vae_layout(value: str | Path | None, *, flag: str = FLAG) -> VaeLayout:
    """Finds and checks the VAE that the user gave: a ``.safetensors`` or pickle file in either layout, or a diffusers folder.

    Raises one CheckpointError about all that is wrong with it. Of a pickle file only the form is checked.
    """
    path = find_model_file(flag, value, QWEN_IMAGE_VAE, allow_folder=True)
    if path.is_dir():
        path = _file_in_folder(path, flag)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        _check_pickle(path)
        return VaeLayout(path, None, None, {})
    header = read_header(path)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    return _layout(path, shapes, header)


def layout_of_shapes(path: Path, shapes: Shapes) -> VaeLayout:
    """The same for the tensors of a pickle file after reading it."""
    return _layout(path, shapes, None)


def _file_in_folder(folder: Path, flag: str) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    return find_model_file(flag, folder, QWEN_IMAGE_VAE)  # raises, naming the model files that are there


def _check_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(2)
    is_zip = start == b"PK"
    if not is_zip and start[:1] != b"\x80":  # the first byte of a pickle, torch's older format
        raise CheckpointError(f"{path} is not a PyTorch file: it was damaged, or has the wrong ending; download it again")
    if is_zip:
        import zipfile

        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is truncated; copy or download it again")


def _layout(path: Path, shapes: Shapes, header: SafetensorsHeader | None) -> VaeLayout:
    names = module_names(shapes)
    collapsed = {names[name]: single_frame_shape(name, shape) for name, shape in shapes.items() if name in names}
    sizes = _read_sizes(collapsed)
    if sizes is None:
        kind = recognise_keys(shapes)
        what = f"is {with_article(kind)}" if kind and kind != QWEN_IMAGE_VAE else "has none of its keys"
        raise CheckpointError(f"{path} is not a {QWEN_IMAGE_VAE}: it {what}; Anima needs qwen_image_vae.safetensors")
    _check_keys(path, shapes, names, expected_shapes(*sizes))
    stem, widths, blocks, latent_channels = sizes
    if 2 ** (len(widths) - 1) != STRIDE:
        raise CheckpointError(f"{path} makes one latent of {2 ** (len(widths) - 1)} pixels; Anima's VAE has {STRIDE}")
    mean, std = _latent_statistics(path, header, latent_channels)
    return VaeLayout(path, header, VaeConfig(stem, widths, blocks, latent_channels, mean, std), names)


def module_names(keys: Shapes) -> dict[str, str]:
    """Key in the file -> name in the module. Keys of ``time_conv`` (never run for one frame) and unknown ones are left out."""
    per_level = 1 + max(
        (int(m[1]) for m in (re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", key) for key in keys) if m), default=0
    )
    found = ((key, _module_name(key, per_level)) for key in keys)
    return {key: name for key, name in found if name is not None}


def _module_name(key: str, per_level: int) -> str | None:
    module, _, leaf = key.rpartition(".")
    if module in TOP_LEVEL:
        return f"{TOP_LEVEL[module]}.{leaf}"
    side, _, rest = module.partition(".")
    if side not in ("encoder", "decoder"):
        return None
    if rest in ENDS:
        return f"{side}.{ENDS[rest]}.{leaf}"
    place = _wan_block(rest) or _diffusers_block(rest, per_level)
    return f"{side}.{place}.{leaf}" if place else None


def _wan_block(rest: str) -> str | None:
    """``downsamples.3.residual.2`` -> ``blocks.3.conv1``, ``middle.1.proj`` -> ``middle.1.proj``."""
    match = re.fullmatch(r"(downsamples|upsamples|middle)\.(\d+)\.(.+)", rest)
    if not match:
        return None
    group, index, part = match.groups()
    parts = {f"residual.{place}": name for place, name in RESIDUAL.items()} | {"shortcut": "shortcut", "resample.1": "conv"}
    if group == "middle":
        parts |= {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}
    return f"{'middle' if group == 'middle' else 'blocks'}.{index}.{parts[part]}" if part in parts else None


def _diffusers_block(rest: str, per_level: int) -> str | None:
    """``down_blocks.3.conv1`` -> ``blocks.3.conv1``, ``up_blocks.1.resnets.0.norm1`` -> ``blocks.4.norm1``."""
    parts = {name: name for name in RESIDUAL.values()} | {"conv_shortcut": "shortcut", "resample.1": "conv"}
    if match := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(\w+)", rest):
        return f"middle.{2 * int(match[1])}.{parts[match[2]]}" if match[2] in parts else None
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(norm|to_qkv|proj)", rest):
        return f"middle.1.{match[1]}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.([\w.]+)", rest):
        return f"blocks.{match[1]}.{parts[match[2]]}" if match[2] in parts else None
    if match := re.fullmatch(r"up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.([\w.]+)", rest):
        index = int(match[1]) * (per_level + 1) + (int(match[3]) if match[3] else per_level)
        return f"blocks.{index}.{parts[match[4]]}" if match[4] in parts else None
    return None


def single_frame_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor has in the one-frame module: no time axis, norm weights flat."""
    if name.endswith(".gamma"):
        count = 1
        for side in shape:
            count *= side
        return (count,)
    return shape[:2] + shape[3:] if len(shape) == 5 else shape


Sizes = tuple[int, tuple[int, ...], int, int]  # stem, widths, blocks, latent channels: the first fields of VaeConfig


def _read_sizes(shapes: Shapes) -> Sizes | None:
    resampling = sorted(int(m[1]) for m in (re.fullmatch(r"encoder\.blocks\.(\d+)\.conv\.weight", name) for name in shapes) if m)
    if not resampling or resampling[0] == 0:
        return None
    blocks = resampling[0]
    first_convs = [f"encoder.blocks.{level * (blocks + 1)}.conv1.weight" for level in range(len(resampling) + 1)]
    wanted = ["encoder.conv_in.weight", *first_convs, "post_quant_conv.weight"]
    if not all(len(shapes.get(name, ())) == 4 for name in wanted):
        return None
    stem, *widths, latent_channels = (shapes[name][0] for name in wanted)
    return stem, tuple(widths), blocks, latent_channels


def expected_shapes(stem: int, widths: tuple[int, ...], blocks: int, latent_channels: int) -> dict[str, tuple[int, ...]]:
    """Name in the module -> shape, for all that ``QwenImageVae`` of these sizes has."""
    z, top = latent_channels, widths[-1]
    shapes = dict(_conv("quant_conv", 2 * z, 2 * z, 1))
    shapes.update(_conv("post_quant_conv", z, z, 1))
    for side, first, last in (("encoder", (stem, 3), 2 * z), ("decoder", (top, z), 3)):
        shapes.update(_conv(f"{side}.conv_in", *first, 3))
        end = top
        for index, (kind, width, out) in enumerate(_layers(side, stem, widths, blocks)):
            shapes.update(_residual(f"{side}.blocks.{index}", width, out) if kind == "residual"
                          else _conv(f"{side}.blocks.{index}.conv", out, width, 3))  # fmt: skip
            end = out
        shapes.update(_residual(f"{side}.middle.0", top, top))
        shapes.update(_residual(f"{side}.middle.2", top, top))
        shapes[f"{side}.middle.1.norm.gamma"] = (top,)
        shapes.update(_conv(f"{side}.middle.1.to_qkv", 3 * top, top, 1))
        shapes.update(_conv(f"{side}.middle.1.proj", top, top, 1))
        shapes[f"{side}.norm_out.gamma"] = (end,)
        shapes.update(_conv(f"{side}.conv_out", last, end, 3))
    return shapes


def _layers(side: str, stem: int, widths: tuple[int, ...], blocks: int) -> Iterator[tuple[str, int, int]]:
    """(kind, width in, width out) of ``encoder.blocks`` or ``decoder.blocks`` in order."""
    decoding = side == "decoder"
    width = widths[-1] if decoding else stem
    for level, out in enumerate(reversed(widths) if decoding else widths):
        for _ in range(blocks + decoding):
            yield "residual", width, out
            width = out
        if level < len(widths) - 1:
            yield "resample", width, width // 2 if decoding else width
            width = width // 2 if decoding else width


def _conv(name: str, out: int, width: int, kernel: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (out, width, kernel, kernel)), (f"{name}.bias", (out,))]


def _residual(name: str, width: int, out: int) -> list[tuple[str, tuple[int, ...]]]:
    shortcut = _conv(f"{name}.shortcut", out, width, 1) if width != out else []
    return [(f"{name}.norm1.gamma", (width,)), *_conv(f"{name}.conv1", out, width, 3),
            (f"{name}.norm2.gamma", (out,)), *_conv(f"{name}.conv2", out, out, 3), *shortcut]  # fmt: skip


def _check_keys(path: Path, shapes: Shapes, names: Mapping[str, str], expected: Shapes) -> None:
    """Raises one CheckpointError about every missing, unexpected and misshapen key, under the file's own names."""
    found = {name: key for key, name in names.items()}
    missing = [name for name in expected if name not in found]
    unexpected = [key for key in shapes if names.get(key) not in expected and ".time_conv." not in key]
    misshapen = {key: (single_frame_shape(key, shapes[key]), expected[name]) for key, name in names.items() if name in expected}
    misshapen = {key: pair for key, pair in misshapen.items() if pair[0] != pair[1]}
    if missing or unexpected or misshapen:
        texts = {key: shape_problem(*pair) for key, pair in misshapen.items()}
        problems = key_problems(missing=missing, unexpected=unexpected, misshapen=texts)
        raise CheckpointError(f"{path} is not a complete {QWEN_IMAGE_VAE}: {problems}")


def _latent_statistics(
    path: Path, header: SafetensorsHeader | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per latent channel: ``config.json`` beside the file, else the header's ``config``, else as published."""
    for config in _configs(path, header):
        mean, std = (_numbers(config.get(key), channels) for key in ("latents_mean", "latents_std"))
        if mean and std:
            return mean, std
    if channels != len(LATENTS_MEAN):
        raise CheckpointError(f"{path} has {channels} latent channels, and there is no config.json with latents_mean and "
                              f"latents_std beside it; the published VAE has {len(LATENTS_MEAN)}")  # fmt: skip
    return LATENTS_MEAN, LATENTS_STD


def _configs(path: Path, header: SafetensorsHeader | None) -> Iterator[dict]:
    texts = []
    beside = path.with_name("config.json")
    if beside.is_file():
        texts.append(beside.read_bytes())
    if header is not None and "config" in header.metadata:
        texts.append(header.metadata["config"].encode("utf-8"))
    for text in texts:
        try:
            config = json.loads(text)
        except ValueError:
            continue  # a folder of models may hold anything under this name
        if isinstance(config, dict):
            yield config


def _numbers(values: object, count: int) -> tuple[float, ...] | None:
    if not isinstance(values, list) or len(values) != count or not all(isinstance(value, (int, float)) for value in values):
        return None
    return tuple(float(value) for value in values)
