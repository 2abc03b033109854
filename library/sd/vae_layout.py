"""The image coder of Stable Diffusion 1.x, 2.x and SDXL (4 latent channels) or of SD3, FLUX and Lumina (16) in a file: sizes and
key names. Needs no torch.

The module is diffusers' AutoencoderKL. The original layout counts the decoder's levels from full resolution, diffusers from the
latents; the original keeps the projections of the attention as 1x1 convolutions; diffusers named them otherwise before 0.17.
Those of 16 channels have no 1x1 convolutions around the latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import CheckpointError
from library.files.json_text import header_settings, read_model_settings
from library.files.key_check import compare_keys
from library.files.model_path import recognise_keys, with_article
from library.files.weights_source import Part, Piece, WeightsSource, changed_shape

STRIDE = 8  # pixels per latent; the whole project counts on it
LATENT_CHANNELS = 4  # of Stable Diffusion 1.x, 2.x and SDXL
ORIGINAL, DIFFUSERS = "original", "diffusers"
PREFIXES = ("first_stage_model.", "vae.", "")
IGNORED = ("loss.", "model_ema.")  # of the coder's own training
KINDS = {LATENT_CHANNELS: "Stable Diffusion VAE", 16: "VAE of SD3, FLUX or Lumina"}  # by latent channels

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Sizes of one coder; the published ones are the defaults."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level, from full resolution down
    blocks: int = 2  # residual blocks of a level of the encoder; the decoder has one more
    latent_channels: int = LATENT_CHANNELS
    norm_groups: int = 32
    quant: bool = True  # has 1x1 convolutions around the latents
    scale: float | None = None  # of the latents, where a config file says it; else it is the architecture's
    shift: float | None = None  # taken off before the scale; the same holds


PUBLISHED = VaeConfig()


@dataclass(frozen=True, slots=True)
class VaePlace:
    """Where a file keeps the coder."""

    prefix: str
    layout: str


def find_vae(keys: Shapes) -> VaePlace | None:
    """The place of the coder in a file of any layout; None where there is none."""
    marks = {ORIGINAL: "decoder.mid.block_1.conv1.weight", DIFFUSERS: "decoder.mid_block.resnets.0.conv1.weight"}
    places = (VaePlace(prefix, layout) for prefix in PREFIXES for layout in marks)
    return next((place for place in places if place.prefix + marks[place.layout] in keys), None)


def vae_part(source: WeightsSource, *, prefix: str, layout: str, channels: int = LATENT_CHANNELS) -> Part[VaeConfig]:
    """The coder whose keys begin with ``prefix``, in the "original" or the "diffusers" ``layout``. ``channels``: of the
    latents that the denoiser wants.

    Raises one CheckpointError about all keys and shapes that are wrong, or naming the other model that the file holds.
    """
    own = {key[len(prefix) :]: shape for key, shape in source.shapes.items() if key.startswith(prefix)}
    own = {key: shape for key, shape in own.items() if not key.startswith(IGNORED)}
    config = _config(source, own, layout, settings=_settings(source, prefix), channels=channels)
    pieces = vae_pieces(config, layout, is_old="decoder.mid_block.attentions.0.query.weight" in own)
    shapes = {piece.key: changed_shape(own[piece.key], piece.change) for piece in pieces.values() if piece.key in own}
    expected = {pieces[name].key: shape for name, shape in module_shapes(config).items()}
    if problems := compare_keys({**own, **shapes}, expected):
        raise CheckpointError(f"{source.path} is not a complete {KINDS[channels]}: {problems}")
    with_prefix = {name: Piece(prefix + piece.key, piece.change) for name, piece in pieces.items()}
    return Part(source=source, config=config, pieces=with_prefix)


# ---------------------------------------------------------------- sizes


def _config(source: WeightsSource, own: Shapes, layout: str, *, settings: Mapping[str, Any], channels: int) -> VaeConfig:
    level = r"encoder\.down\.(\d+)\.block\.0\." if layout == ORIGINAL else r"encoder\.down_blocks\.(\d+)\.resnets\.0\."
    block = r"encoder\.down\.0\.block\.(\d+)\." if layout == ORIGINAL else r"encoder\.down_blocks\.0\.resnets\.(\d+)\."
    widths = {int(m[1]): shape[0] for key, shape in own.items() if (m := re.fullmatch(level + r"conv1\.weight", key))}
    blocks = {int(m[1]) for key in own if (m := re.match(block, key))}
    into_decoder = own.get("decoder.conv_in.weight", ())
    if not widths or not blocks or len(into_decoder) != 4:
        raise CheckpointError(f"{source.path} holds no {KINDS[channels]}{_other_model(source)}")
    _check_family(source, found=into_decoder[1], wanted=channels, levels=len(widths))
    config = VaeConfig(
        widths=tuple(widths[number] for number in sorted(widths)),
        blocks=len(blocks),
        norm_groups=int(_positive(source, settings, ("norm_groups", "norm_num_groups"), PUBLISHED.norm_groups)),
        latent_channels=channels,
        quant=_has_quant(own, settings, channels),
        scale=_positive(source, settings, ("scaling_factor",), None),
        shift=_shift(source, settings),
    )
    _check_groups(source, config)
    return config


def _other_model(source: WeightsSource) -> str:
    kind = recognise_keys(source.shapes)
    if kind is None:
        return ": none of its keys is one of a VAE's"
    return f": it is {with_article(kind)}"


def _check_family(source: WeightsSource, *, found: int, wanted: int, levels: int) -> None:
    if found != wanted:
        whose = f" (it is a {KINDS[found]})" if found in KINDS else ""
        needs = "Stable Diffusion 1.x, 2.x and SDXL need" if wanted == LATENT_CHANNELS else "SD3 and Lumina need"
        raise CheckpointError(f"{source.path} is a VAE of {found} latent channels{whose}; {needs} one of {wanted}")
    if 2 ** (levels - 1) != STRIDE:
        raise CheckpointError(
            f"{source.path} makes one latent of {2 ** (levels - 1)} pixels; the VAEs that are trained on have {STRIDE}"
        )


def _check_groups(source: WeightsSource, config: VaeConfig) -> None:
    wrong = [width for width in config.widths if width % config.norm_groups]
    if wrong:
        raise CheckpointError(
            f"{source.path} has layers of {wrong[0]} channels, which {config.norm_groups} norm groups do not divide; for a VAE "
            "of another form say norm_groups in its config"
        )


def _settings(source: WeightsSource, prefix: str) -> Mapping[str, Any]:
    """What shapes cannot tell: ``vae`` of the ``config`` entry in a safetensors header, else a coder's config.json beside it."""
    header = header_settings(source.metadata)
    described = header.get("vae")
    if isinstance(described, dict):
        return described
    if not prefix and not {"norm_groups", "norm_num_groups"}.isdisjoint(header):  # the header of a file of one model
        return header
    if prefix:  # beside a file of several models may lie any model's
        return {}
    path = Path(source.path)
    found = read_model_settings((path if path.is_dir() else path.parent) / "config.json")
    return found if found.get("_class_name") == "AutoencoderKL" else {}  # else it is the config of another model


def _positive(source: WeightsSource, settings: Mapping[str, Any], names: tuple[str, ...], published: Any) -> Any:
    name = next((name for name in names if settings.get(name) is not None), None)
    if name is None:
        return published
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"the config of {source.path} says {name} = {value!r}; give a positive number")
    return value


def _shift(source: WeightsSource, settings: Mapping[str, Any]) -> float | None:
    value = settings.get("shift_factor")
    if isinstance(value, bool) or not isinstance(value, int | float | None) or not math.isfinite(value or 0):
        raise CheckpointError(f"the config of {source.path} says shift_factor = {value!r}; give a number")
    return None if value is None else float(value)


def _has_quant(own: Shapes, settings: Mapping[str, Any], channels: int) -> bool:
    """Whether the 1x1 convolutions around the latents belong to the coder: a file of 4 channels that lacks them is damaged."""
    if isinstance(said := settings.get("use_quant_conv"), bool):
        return said
    return channels == LATENT_CHANNELS or any(key.startswith(("quant_conv.", "post_quant_conv.")) for key in own)


# ---------------------------------------------------------------- names


def module_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Every name and shape of the state dict of diffusers' AutoencoderKL of these sizes."""
    z, stem, top = config.latent_channels, config.widths[0], config.widths[-1]
    shapes = dict([*_conv("quant_conv", 2 * z, 2 * z, 1), *_conv("post_quant_conv", z, z, 1)] if config.quant else [])
    for side, first, last, end in (("encoder", (stem, 3), 2 * z, top), ("decoder", (top, z), 3, stem)):
        shapes.update(_conv(f"{side}.conv_in", *first, 3))
        shapes.update(_levels(config, side))
        for number in range(2):
            shapes.update(_residual(f"{side}.mid_block.resnets.{number}", top, top))
        shapes.update(_attention(f"{side}.mid_block.attentions.0", top))
        shapes.update(_norm(f"{side}.conv_norm_out", end))
        shapes.update(_conv(f"{side}.conv_out", last, end, 3))
    return shapes


Entries = Iterator[tuple[str, tuple[int, ...]]]


def _levels(config: VaeConfig, side: str) -> Entries:
    encodes = side == "encoder"
    widths = config.widths if encodes else config.widths[::-1]
    group, between = ("down_blocks", "downsamplers") if encodes else ("up_blocks", "upsamplers")
    width = widths[0]
    for level, out in enumerate(widths):
        for number in range(config.blocks + (not encodes)):
            yield from _residual(f"{side}.{group}.{level}.resnets.{number}", width, out)
            width = out
        if level < len(widths) - 1:
            yield from _conv(f"{side}.{group}.{level}.{between}.0.conv", out, out, 3)


def _residual(name: str, width: int, out: int) -> Entries:
    yield from _norm(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", out, width, 3)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out, 3)
    if width != out:
        yield from _conv(f"{name}.conv_shortcut", out, width, 1)


def _attention(name: str, width: int) -> Entries:
    yield from _norm(f"{name}.group_norm", width)
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{name}.{projection}.weight", (width, width)
        yield f"{name}.{projection}.bias", (width,)


def _norm(name: str, width: int) -> Entries:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _conv(name: str, out: int, width: int, kernel: int) -> Entries:
    yield f"{name}.weight", (out, width, kernel, kernel)
    yield f"{name}.bias", (out,)


OLD_PROJECTIONS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
ORIGINAL_PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


def vae_pieces(config: VaeConfig, layout: str, *, is_old: bool = False) -> dict[str, Piece]:
    """Name in the module -> key without prefix. ``is_old``: the diffusers layout from before 0.17."""
    pieces = {}
    for name, shape in module_shapes(config).items():
        if layout == ORIGINAL:
            key = _original_name(name, len(config.widths))
        else:
            key = _with_projections(name, OLD_PROJECTIONS) if is_old else name
        pieces[name] = Piece(key, "matrix" if len(shape) == 2 else "")
    return pieces


def _original_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = _with_projections(name, ORIGINAL_PROJECTIONS).replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name).replace("down_blocks.", "down.")
    return re.sub(r"(down|up)samplers\.0", r"\1sample", name.replace(".resnets.", ".block."))


def _with_projections(name: str, others: Mapping[str, str]) -> str:
    """Of a name inside the attention of the middle: the last part in other words."""
    start, found, rest = name.partition("mid_block.attentions.0.")
    part, _, leaf = rest.rpartition(".")
    return f"{start}{found}{others.get(part, part)}.{leaf}" if found else name
