"""Stable Diffusion 3 and 3.5 as files: sizes, key names and shapes of the MMDiT, and where a checkpoint keeps its parts.

Needs no torch. Names of modules are those of the published checkpoints, without their prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.errors import CheckpointError
from library.files.json_text import header_settings
from library.files.key_check import compare_keys
from library.files.model_sizes import block_count, scaled_float8_problem, usual_side
from library.files.weights_source import Part, Piece, WeightsSource

if TYPE_CHECKING:
    from library.sd.clip_layout import ClipConfig
    from library.sd.vae_layout import VaeConfig
    from library.sd3.t5_layout import T5Config

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")  # of the MMDiT in a file; longest first
OTHER_PARTS = ("text_encoders.", "first_stage_model.", "vae.", "cond_stage_model.")  # beside an MMDiT without a prefix
BLOCKS = "joint_blocks."
PIXELS_PER_LATENT = 8
HEAD_DIM = 64  # of all published models
TIME_WIDTH = 256  # sinusoids of the noise level
STREAMS = CONTEXT, IMAGE = "context_block", "x_block"
MEDIUM, MEDIUM_35, LARGE_35 = "medium", "5-medium", "5-large"  # as the reference names the kinds

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MmditConfig:
    """Sizes of the MMDiT; the defaults are those of SD3-medium (2B parameters)."""

    width: int = 1536
    blocks: int = 24
    heads: int = 24
    mlp_hidden: int = 6144
    patch: int = 2
    in_channels: int = 16
    position_side: int = 192  # the position table is square; in patches
    pooled_width: int = 2048
    context_width: int = 4096
    qk_norm: bool = False
    dual_blocks: tuple[int, ...] = ()  # blocks with a second attention, of image tokens alone

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def kind(self) -> str:
        """Which published model this is built like; decides names in LoRA metadata."""
        if not self.qk_norm:
            return MEDIUM
        return MEDIUM_35 if self.dual_blocks else LARGE_35


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3TextParts:
    """The checked text encoders; SD3 may be used without T5, whose tokens are then zeros."""

    clip_l: Part[ClipConfig]
    clip_g: Part[ClipConfig]
    t5: Part[T5Config] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3Layouts:
    """The checked models of a run; None for those that were not asked for."""

    denoiser: Part[MmditConfig] | None = None
    text: Sd3TextParts | None = None
    vae: Part[VaeConfig] | None = None


def mmdit_prefix(names: Iterable[str]) -> str | None:
    """What the names of the MMDiT begin with; None where there is none."""
    found = list(names)
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix + BLOCKS) for name in found)), None)


def mmdit_part(source: WeightsSource, *, prefix: str) -> Part[MmditConfig]:
    """The MMDiT whose tensors are called ``prefix`` + a name of ``expected_shapes``.

    Raises one CheckpointError that lists all tensors that are missing, unexpected or of another shape.
    """
    found = {name.removeprefix(prefix): shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    if not prefix:
        found = {name: shape for name, shape in found.items() if not name.startswith(OTHER_PARTS)}
    if not any(name.startswith(BLOCKS) for name in found):
        raise CheckpointError(
            f"{source.path} has no MMDiT: none of its {len(source.shapes):,} tensors is called {prefix}{BLOCKS}*"
        )
    config = config_from_shapes(found, mmdit_settings(source))
    if problem := next(layout_problems(config, found), ""):
        raise CheckpointError(f"{source.path} does not fit Stable Diffusion 3: {problem}")
    return Part(source=source, config=config, pieces={name: Piece(prefix + name) for name in expected_shapes(config)})


def layout_problems(config: MmditConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The keys first: sizes read from a file with wrong keys may be guesses."""
    sizes = f"(read as {config.blocks} blocks of width {config.width}, {config.heads} heads)"
    if text := scaled_float8_problem(shapes):
        yield text
    elif text := compare_keys(shapes, expected_shapes(config)):
        yield f"{text} {sizes}"
    elif config.width % config.heads:
        yield f"its width {config.width} cannot be cut into {config.heads} heads: its config needs heads"


def position_problem(config: MmditConfig, rows: int, columns: int) -> str | None:
    """Why pictures of ``rows`` x ``columns`` patches have no place in the model's position table; None where they have."""
    side = config.position_side
    if max(rows, columns) <= side:
        return None
    pixels = PIXELS_PER_LATENT * config.patch
    return (
        f"{columns * pixels}x{rows * pixels} pixels are more than {side * pixels} on a side, for which the model has positions; "
        "give a smaller resolution (--resolution, --max_bucket_reso; --w and --h of a prompt), or --enable_scaled_pos_embed"
    )


def with_centre_of_positions(config: MmditConfig, sizes_wh: Iterable[tuple[int, int]]) -> MmditConfig:
    """A config of the same model with no more positions than pictures of these sizes, in pixels, need: those in the middle of the
    table, where every window lies that is not cut at random. The table of SD3.5-medium has 384 x 384, half a gigabyte."""
    longest = max((side for size in sizes_wh for side in size), default=0) // (PIXELS_PER_LATENT * config.patch)
    needed = longest + (config.position_side - longest) % 2  # else the middle would be another place
    return replace(config, position_side=min(max(needed, 2 - config.position_side % 2), config.position_side))


# ---------------------------------------------------------------- sizes


def config_from_shapes(shapes: Shapes, settings: Mapping[str, Any]) -> MmditConfig:
    """Each size is the one that most tensors agree on; heads without a q/k norm come from ``settings``, else as published."""
    published = MmditConfig()
    width = usual_side(
        shapes, r"(x_embedder\.proj|context_embedder|joint_blocks\.\d+\.x_block\.attn\.proj)\.bias", 0, published.width
    )
    positions = usual_side(shapes, "pos_embed", 1, published.position_side**2)
    norms = usual_side(shapes, r"joint_blocks\.\d+\.\w+_block\.attn2?\.ln_[qk]\.weight", 0, 0)
    heads = max(width // norms, 1) if norms else whole_number(settings, "heads", max(width // HEAD_DIM, 1))
    return MmditConfig(
        width=width,
        blocks=block_count(shapes, BLOCKS),
        heads=heads,
        mlp_hidden=usual_side(shapes, r"joint_blocks\.\d+\.\w+_block\.mlp\.fc1\.bias", 0, 4 * width),
        patch=usual_side(shapes, r"x_embedder\.proj\.weight", 2, published.patch),
        in_channels=usual_side(shapes, r"x_embedder\.proj\.weight", 1, published.in_channels),
        position_side=math.isqrt(positions),
        pooled_width=usual_side(shapes, r"y_embedder\.mlp\.0\.weight", 1, published.pooled_width),
        context_width=usual_side(shapes, r"context_embedder\.weight", 1, published.context_width),
        qk_norm=norms > 0,
        dual_blocks=dual_blocks(shapes),
    )


def dual_blocks(names: Iterable[str]) -> tuple[int, ...]:
    found = (re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name) for name in names)
    return tuple(sorted({int(match[1]) for match in found if match}))


def mmdit_settings(source: WeightsSource) -> dict[str, Any]:
    """What shapes cannot tell: ``mmdit`` of the header's ``config`` entry, or that entry itself."""
    settings = header_settings(source.metadata)
    own = settings.get("mmdit", settings)
    return own if isinstance(own, dict) else {}


def whole_number(settings: Mapping[str, Any], name: str, published: int) -> int:
    value = settings.get(name, published)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"the model's config says {name} = {value!r}; give a whole number above 0")
    return value


# ---------------------------------------------------------------- names


def expected_shapes(config: MmditConfig) -> Shapes:
    """Every name and shape of ``Mmdit(config).state_dict()``."""
    width, patch = config.width, config.patch
    shapes: Shapes = {
        "pos_embed": (1, config.position_side**2, width),
        "x_embedder.proj.weight": (width, config.in_channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        **linear("t_embedder.mlp.0", width, TIME_WIDTH),
        **linear("t_embedder.mlp.2", width, width),
        **linear("y_embedder.mlp.0", width, config.pooled_width),
        **linear("y_embedder.mlp.2", width, width),
        **linear("context_embedder", width, config.context_width),
        **linear("final_layer.linear", config.in_channels * patch**2, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for number in range(config.blocks):
        for stream in STREAMS:
            own = half_shapes(config, number, stream)
            shapes.update({f"{BLOCKS}{number}.{stream}.{name}": shape for name, shape in own.items()})
    return shapes


def half_shapes(config: MmditConfig, number: int, stream: str) -> Shapes:
    """Of one block's half; the context's half of the last block gives only keys and values to the image's."""
    width = config.width
    is_last_context = stream == CONTEXT and number == config.blocks - 1
    is_dual = stream == IMAGE and number in config.dual_blocks
    modulations = 2 if is_last_context else 9 if is_dual else 6
    shapes = {**linear("adaLN_modulation.1", modulations * width, width), **attention_shapes(config, "attn")}
    if is_last_context:
        return {name: shape for name, shape in shapes.items() if not name.startswith("attn.proj.")}
    if is_dual:
        shapes |= attention_shapes(config, "attn2")
    return shapes | linear("mlp.fc1", config.mlp_hidden, width) | linear("mlp.fc2", width, config.mlp_hidden)


def attention_shapes(config: MmditConfig, name: str) -> Shapes:
    width = config.width
    shapes = linear(f"{name}.qkv", 3 * width, width) | linear(f"{name}.proj", width, width)
    norms: Shapes = {f"{name}.ln_{which}.weight": (config.head_dim,) for which in "qk"} if config.qk_norm else {}
    return shapes | norms


def linear(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
