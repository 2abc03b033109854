"""The U-Net of a Stable Diffusion checkpoint: its sizes, and where each of its tensors lies. Needs no torch.

Two layouts are read: the original one of single files, and that of diffusers' folders. How many levels and blocks there are shows
in the names; widths and depths in the shapes; heads and norm groups in the settings that go with the file, if there are any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from library.errors import CheckpointError
from library.files.json_text import header_settings, read_model_settings
from library.files.key_check import compare_keys
from library.files.weights_source import Part, Piece, WeightsSource, changed_shape
from library.sd.unet_names import Shapes, UNetConfig, expected_shapes, original_names, transformers

__all__ = ["UNetConfig", "original_names", "unet_part"]

Layout = Literal["original", "diffusers"]

PREFIX = "model.diffusion_model."  # of the U-Net in a single file
ROOTS = {"original": "input_blocks.", "diffusers": "down_blocks."}
SCALED_FLOAT8 = (".scale_weight", ".weight_scale", "scaled_fp8")  # ends of names
PUBLISHED_HEADS = 8  # of SD 1 on every level
PUBLISHED_HEAD_DIM = 64  # of SD 2 and SDXL
PUBLISHED_GROUPS = 32
SD2_CONTEXT_WIDTH = 1024
PROJECTION = re.compile(r".*\.attentions\.\d+\.proj_(in|out)\.weight")
PROJECTION_CHANGES = {2: "matrix", 4: "convolution"}  # by the number of sides that the module's weight has


def unet_part(source: WeightsSource, *, prefix: str, layout: Layout) -> Part[UNetConfig]:
    """The U-Net whose tensors' names begin with ``prefix``: "model.diffusion_model." in a single file, "" in a folder of its own.

    Raises one CheckpointError that lists all tensors that are missing, unexpected or of another shape.
    """
    found = {name.removeprefix(prefix): shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    if not any(name.startswith(ROOTS[layout]) for name in found):
        raise CheckpointError(
            f"{source.path} has no U-Net: none of its {len(source.shapes):,} tensors is called {prefix}{ROOTS[layout]}*"
        )
    if scale := next((name for name in found if name.endswith(SCALED_FLOAT8)), None):
        raise CheckpointError(f"{source.path}: its U-Net is float8 with scales of its own ({prefix}{scale}), which is not read; "
                              "give the float16 or bfloat16 file (--fp8_base keeps its weights in 8 bits)")  # fmt: skip
    frame = _original_frame(found) if layout == "original" else _diffusers_frame(found)
    names = _file_names(frame, layout)
    shapes = {name: found[key] for name, key in names.items() if key in found}
    config = _with_sizes(frame, shapes, unet_settings(source, layout))
    pieces = _pieces(config, found, layout)
    if problem := _key_problem(config, pieces, found, prefix) or next(_size_problems(config), ""):
        raise CheckpointError(f"{source.path}: its U-Net is not one of Stable Diffusion: {problem} (read as {described(config)})")
    return Part(source=source, config=config, pieces={name: Piece(prefix + p.key, p.change) for name, p in pieces.items()})


def described(config: UNetConfig) -> str:
    """For messages: ``widths 320, 640, 1280 with 0, 2, 10 transformer blocks``"""
    return f"widths {_listed(config.widths)} with {_listed(config.depths)} transformer blocks"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _pieces(config: UNetConfig, found: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Piece]:
    """Of every tensor of the module, whether it is in the file or not; keys are without the prefix."""
    names, expected = _file_names(config, layout), expected_shapes(config)
    return {name: Piece(key, _change(name, found.get(key), expected[name])) for name, key in names.items()}


def _change(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...]) -> str:
    """Projections are stored as matrices by some and as 1x1 convolutions by others."""
    if found is None or found == expected or not PROJECTION.fullmatch(name) or len(found) not in PROJECTION_CHANGES:
        return ""
    return PROJECTION_CHANGES[len(expected)]


def _key_problem(config: UNetConfig, pieces: Mapping[str, Piece], found: Mapping[str, tuple[int, ...]], prefix: str) -> str:
    expected = {prefix + pieces[name].key: shape for name, shape in expected_shapes(config).items()}
    changes = {piece.key: piece.change for piece in pieces.values()}
    shapes = {prefix + key: changed_shape(shape, changes.get(key, "")) for key, shape in found.items()}
    return compare_keys(shapes, expected)


def _size_problems(config: UNetConfig) -> Iterator[str]:
    if config.in_channels != config.out_channels:
        yield (
            f"it takes {config.in_channels} channels and predicts {config.out_channels}, as inpainting models do; "
            "give a model that draws whole pictures"
        )
    for width, heads in zip(config.widths, config.heads, strict=True):
        if width % config.norm_groups:
            yield f"its width {width} cannot be cut into {config.norm_groups} norm groups: its config needs norm_groups"
        if width % heads:
            yield f"its width {width} cannot be cut into {heads} heads: its config needs heads or head_dim"


def _file_names(config: UNetConfig, layout: Layout) -> dict[str, str]:
    """Name of each tensor in the module -> in the file, without the prefix."""
    if layout == "diffusers":
        return {name: name for name in expected_shapes(config)}
    modules = original_names(config)
    paths = ((name, *name.rpartition(".")[::2]) for name in expected_shapes(config))
    return {name: f"{modules[module]}.{leaf}" for name, module, leaf in paths}


# ---------------------------------------------------------------- sizes


def _original_frame(found: Mapping[str, tuple[int, ...]]) -> UNetConfig:
    """Levels, blocks and depths, from the names of the original layout; widths are not known yet."""
    downs = {int(match[1]) for name in found if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name))}
    last = max((int(match[1]) for name in found if (match := re.match(r"input_blocks\.(\d+)\.", name))), default=0)
    levels = len(downs) + 1
    layers = max((last - len(downs)) // levels, 1)
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    depths = tuple(_depth(found, f"input_blocks.{number}.1.") for number in firsts)
    return _frame(levels, layers, depths, _depth(found, "middle_block.1."))


def _diffusers_frame(found: Mapping[str, tuple[int, ...]]) -> UNetConfig:
    places = [match for name in found if (match := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", name))]
    levels = 1 + max((int(match[1]) for match in places), default=0)
    layers = 1 + max((int(match[2]) for match in places), default=0)
    depths = tuple(_depth(found, f"down_blocks.{level}.attentions.0.") for level in range(levels))
    return _frame(levels, layers, depths, _depth(found, "mid_block.attentions.0."))


def _frame(levels: int, layers: int, depths: tuple[int, ...], middle_depth: int) -> UNetConfig:
    return UNetConfig(
        widths=(1,) * levels,
        depths=depths,
        middle_depth=depths[-1] or max(middle_depth, 1),  # diffusers' class has one number for both
        heads=(1,) * levels,
        context_width=1,
        vector_width=1,  # as if there were one, so that its tensors are among those looked for
        time_width=1,
        layers=layers,
    )


def _depth(found: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"transformer_blocks\.(\d+)\.")
    return 1 + max((int(match[1]) for name in found if (match := pattern.match(name))), default=-1)


def _with_sizes(frame: UNetConfig, shapes: Shapes, settings: Mapping[str, Any]) -> UNetConfig:
    """The frame's model with the sizes that ``shapes`` (diffusers' names) has and ``settings`` says."""
    widths = tuple(
        _side(shapes, rf"down_blocks\.{level}\.resnets\.\d+\.(conv1|conv2|time_emb_proj)\.weight", 0)
        for level in range(frame.levels)
    )
    context_width = _side(shapes, r".*\.attn2\.to_[kv]\.weight", 1)
    vector_width = _side(shapes, r"add_embedding\.linear_1\.weight", 1, absent=0)
    matrices = any(len(shapes.get(f"{name}.proj_in.weight", ())) == 2 for name, _, _ in transformers(frame))
    fixed_heads = not (vector_width or matrices or context_width == SD2_CONTEXT_WIDTH)
    return UNetConfig(
        widths=widths,
        depths=frame.depths,
        middle_depth=frame.middle_depth,
        heads=_heads(widths, settings, fixed=fixed_heads),
        context_width=context_width,
        vector_width=vector_width,
        time_width=_side(shapes, r"time_embedding\.linear_[12]\.weight", 0),
        layers=frame.layers,
        in_channels=_side(shapes, r"conv_in\.weight", 1, absent=4),
        out_channels=_side(shapes, r"conv_out\.weight", 0, absent=4),
        norm_groups=_positive(settings, "norm_groups", PUBLISHED_GROUPS),
        linear_projections=vector_width > 0,
    )


def _side(shapes: Shapes, pattern: str, axis: int, *, absent: int = 1) -> int:
    """The side that most of these tensors have."""
    compiled = re.compile(pattern)
    sides = Counter(shape[axis] for name, shape in shapes.items() if len(shape) > axis and compiled.fullmatch(name))
    return sides.most_common(1)[0][0] if sides else absent


# ---------------------------------------------------------------- settings


def _heads(widths: tuple[int, ...], settings: Mapping[str, Any], *, fixed: bool) -> tuple[int, ...]:
    """``fixed``: the published model of this kind has the same number of heads everywhere, as SD 1 does."""
    heads = settings.get("heads")
    if isinstance(heads, list):
        if len(heads) != len(widths) or not all(type(number) is int and number > 0 for number in heads):
            raise CheckpointError(
                f"the model's config says heads = {heads!r}; give {len(widths)} positive numbers, one for each level"
            )
        return tuple(heads)
    if heads is not None or (fixed and "head_dim" not in settings):
        return (_positive(settings, "heads", PUBLISHED_HEADS),) * len(widths)
    head_dim = _positive(settings, "head_dim", PUBLISHED_HEAD_DIM)
    return tuple(max(width // head_dim, 1) for width in widths)


def _positive(settings: Mapping[str, Any], name: str, published: int) -> int:
    value = settings.get(name, published)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"the model's config says {name} = {value!r}; give a whole number above 0 (published: {published})")
    return value


def unet_settings(source: WeightsSource, layout: Layout) -> dict[str, Any]:
    """What shapes cannot tell: the entry ``config`` of the file's metadata, or a diffusers folder's config.json in its terms."""
    if "config" in source.metadata:
        own = header_settings(source.metadata).get("unet")
        return own if isinstance(own, dict) else {}
    beside = Path(source.path) if Path(source.path).is_dir() else Path(source.path).parent
    given = read_model_settings(beside / "config.json") if layout == "diffusers" else {}
    heads = given.get("num_attention_heads") or given.get("attention_head_dim")  # diffusers' name for the number of heads
    groups = given.get("norm_num_groups")
    return {name: value for name, value in (("heads", heads), ("norm_groups", groups)) if value is not None}
