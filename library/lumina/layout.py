"""Lumina Image 2.0's files: names, shapes and sizes of its Next-DiT (arXiv 2503.21758). Needs no torch.

Names are those of the published checkpoint. All-in-one files put ``model.diffusion_model.`` before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import CheckpointError
from library.files.json_text import header_settings, read_model_settings
from library.files.key_check import compare_keys
from library.files.model_path import LUMINA, described, recognise_keys
from library.files.model_sizes import block_count, scaled_float8_problem, usual_side
from library.files.weights_source import Part, Piece, WeightsSource

if TYPE_CHECKING:
    from library.lumina.gemma_layout import GemmaConfig
    from library.lumina.tokenizer import GemmaTokenizerFile
    from library.sd.vae_layout import VaeConfig

PREFIXES = ("model.diffusion_model.", "")  # of all-in-one files and of files of its own
ROOT = "cap_embedder.0.weight"
IGNORED = frozenset({"norm_final.weight"})  # in the published file; no computation uses it
Z_IMAGE_WIDTH = 3840
SETTINGS = "nextdit"  # the DiT's object inside the ``config`` entry
AXES = 3  # caption position, row, column

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextDitConfig:
    """Sizes of one denoiser; the published ones are the defaults."""

    width: int = 2304
    blocks: int = 26
    context_refiners: int = 2
    noise_refiners: int = 2
    heads: int = 24
    kv_heads: int = 8
    head_dim: int = 96
    mlp_hidden: int = 9216
    context_width: int = 2304  # of the caption's states
    time_width: int = 1024
    frequencies: int = 256  # channels of the time's sinusoid
    in_channels: int = 16
    patch: int = 2
    axes_dims: tuple[int, ...] = (32, 32, 32)  # channels of a head that turn with caption position, row, column
    axes_lens: tuple[int, ...] = (300, 512, 512)  # positions that the model knows on each
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm_eps: float = 1e-6


PUBLISHED = NextDitConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaLayouts:
    """The checked models of a run; None for those that were not asked for."""

    denoiser: Part[NextDitConfig] | None = None
    text: Part[GemmaConfig] | None = None
    tokenizer: GemmaTokenizerFile | None = None
    vae: Part[VaeConfig] | None = None


def find_nextdit(names: Mapping[str, Any]) -> str | None:
    """The prefix of the denoiser in a file; None where it has none."""
    return next((prefix for prefix in PREFIXES if prefix + ROOT in names), None)


def nextdit_part(source: WeightsSource, *, prefix: str) -> Part[NextDitConfig]:
    """The denoiser whose tensors' names begin with ``prefix``.

    Raises one CheckpointError that lists all tensors that are missing, unexpected or of another shape, or names the other model
    that the file holds.
    """
    own = {name[len(prefix) :]: shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    if problem := _other_model(own, source):
        raise CheckpointError(f"{source.path} {problem}")
    own = {name: shape for name, shape in own.items() if name not in IGNORED}
    config = config_from_shapes(own, nextdit_settings(source))
    if problem := next(_problems(config, own), ""):
        raise CheckpointError(f"{source.path} is not a complete Lumina Image 2.0 model: {problem}")
    return Part(source=source, config=config, pieces={name: Piece(prefix + name) for name in expected_shapes(config)})


def _other_model(own: Shapes, source: WeightsSource) -> str:
    """What the file is instead; empty where it is what it should be."""
    kind = recognise_keys(own) or recognise_keys(source.shapes)
    if kind != LUMINA:
        what = described(kind) if kind else "a file without any name of Lumina Image 2.0's tensors"
        return f"is {what}: give the Lumina Image 2.0 model"
    if own.get(ROOT) is None:
        return f"has no {ROOT}, with which Lumina Image 2.0 takes captions in: give the whole model"
    if own.get("x_embedder.weight", (0,))[0] == Z_IMAGE_WIDTH:
        return f"is Z-Image (width {Z_IMAGE_WIDTH}), another model of this family: give the Lumina Image 2.0 model"
    return ""


def _problems(config: NextDitConfig, shapes: Shapes) -> Iterator[str]:
    """The names first: sizes read from a file with wrong names may be guesses."""
    sizes = f"(read as {config.blocks} blocks of width {config.width}, {config.heads} heads of {config.head_dim})"
    if text := scaled_float8_problem(shapes):
        yield text
    elif text := compare_keys(shapes, expected_shapes(config)):
        yield f"{text} {sizes}"
    elif config.heads % config.kv_heads:
        yield f"its {config.heads} heads cannot share {config.kv_heads} heads of keys evenly"
    elif sum(config.axes_dims) != config.head_dim or any(side % 2 for side in config.axes_dims):
        yield (
            f"its rotary axes have {', '.join(map(str, config.axes_dims))} channels; even numbers whose sum is the head width "
            f"{config.head_dim} are needed: mend axes_dims in its config"
        )


# ---------------------------------------------------------------- sizes


def config_from_shapes(shapes: Shapes, settings: Mapping[str, Any]) -> NextDitConfig:
    """Sizes from the shapes, the rest from ``settings``, else as published. Each size is the one most tensors agree on."""
    block = r"(layers|noise_refiner|context_refiner)\.\d+\."
    head_dim = max(usual_side(shapes, rf"{block}attention\.[qk]_norm\.weight", 0, PUBLISHED.head_dim), 1)
    inner = usual_side(shapes, rf"{block}attention\.out\.weight", 1, PUBLISHED.heads * head_dim)
    rows = usual_side(shapes, rf"{block}attention\.qkv\.weight", 0, inner + 2 * PUBLISHED.kv_heads * head_dim)
    heads = max(inner // head_dim, 1)
    patch = int(_positive(settings, "patch", PUBLISHED.patch))
    features = usual_side(shapes, r"x_embedder\.weight", 1, PUBLISHED.in_channels * patch**2)
    return NextDitConfig(
        width=usual_side(shapes, rf"({block}(attention|ffn)_norm[12]|x_embedder)\.weight", 0, PUBLISHED.width),
        blocks=block_count(shapes, "layers."),
        context_refiners=block_count(shapes, "context_refiner."),
        noise_refiners=block_count(shapes, "noise_refiner."),
        heads=heads,
        kv_heads=max((rows // head_dim - heads) // 2, 1),
        head_dim=head_dim,
        mlp_hidden=usual_side(shapes, rf"{block}feed_forward\.w[13]\.weight", 0, PUBLISHED.mlp_hidden),
        context_width=usual_side(shapes, r"cap_embedder\.0\.weight", 0, PUBLISHED.context_width),
        time_width=usual_side(shapes, r"t_embedder\.mlp\.[02]\.weight", 0, PUBLISHED.time_width),
        frequencies=usual_side(shapes, r"t_embedder\.mlp\.0\.weight", 1, PUBLISHED.frequencies),
        in_channels=max(features // patch**2, 1),
        patch=patch,
        axes_dims=_axes(settings, "axes_dims", published_axes(head_dim)),
        axes_lens=_axes(settings, "axes_lens", PUBLISHED.axes_lens),
        rope_theta=_positive(settings, "rope_theta", PUBLISHED.rope_theta),
        norm_eps=_positive(settings, "norm_eps", PUBLISHED.norm_eps),
        qk_norm_eps=_positive(settings, "qk_norm_eps", PUBLISHED.qk_norm_eps),
    )


def published_axes(head_dim: int) -> tuple[int, ...]:
    """Three equal parts; where that cannot be, rows and columns have the even number below, the caption's positions the rest."""
    side = head_dim // (2 * AXES) * 2
    return head_dim - (AXES - 1) * side, *(side,) * (AXES - 1)


def nextdit_settings(source: WeightsSource) -> dict[str, Any]:
    """What shapes cannot tell: ``nextdit`` of the ``config`` entry in the file's metadata, or the entry itself in a file of this
    model alone; for a folder, its config.json."""
    path = Path(source.path)
    found = read_model_settings(path / "config.json") if path.is_dir() else header_settings(source.metadata)
    inner = found.get(SETTINGS, found)
    return inner if isinstance(inner, dict) else {}


def _positive(settings: Mapping[str, Any], name: str, published: float) -> float:
    value = settings.get(name, published)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"the model's config says {name} = {value!r}; give a positive number (published: {published})")
    return value


def _axes(settings: Mapping[str, Any], name: str, published: tuple[int, ...]) -> tuple[int, ...]:
    value = settings.get(name, list(published))
    if not isinstance(value, list) or len(value) != AXES or not all(type(side) is int and side >= 0 for side in value):
        raise CheckpointError(f"the model's config says {name} = {value!r}; give {AXES} whole numbers (here {list(published)})")
    return tuple(value)


# ---------------------------------------------------------------- names


def expected_shapes(config: NextDitConfig) -> Shapes:
    """Every name and shape of ``NextDit(config).state_dict()``."""
    width, time, features = config.width, config.time_width, config.in_channels * config.patch**2
    plain = block_shapes(config)
    modulated = {**plain, "adaLN_modulation.1.weight": (4 * width, time), "adaLN_modulation.1.bias": (4 * width,)}
    return {
        "t_embedder.mlp.0.weight": (time, config.frequencies),
        "t_embedder.mlp.0.bias": (time,),
        "t_embedder.mlp.2.weight": (time, time),
        "t_embedder.mlp.2.bias": (time,),
        "cap_embedder.0.weight": (config.context_width,),
        "cap_embedder.1.weight": (width, config.context_width),
        "cap_embedder.1.bias": (width,),
        "x_embedder.weight": (width, features),
        "x_embedder.bias": (width,),
        **repeated("context_refiner", plain, config.context_refiners),
        **repeated("noise_refiner", modulated, config.noise_refiners),
        **repeated("layers", modulated, config.blocks),
        "final_layer.linear.weight": (features, width),
        "final_layer.linear.bias": (features,),
        "final_layer.adaLN_modulation.1.weight": (width, time),
        "final_layer.adaLN_modulation.1.bias": (width,),
    }


def block_shapes(config: NextDitConfig) -> Shapes:
    """Of one block without modulation, as the context refiner's are."""
    width, hidden, inner = config.width, config.mlp_hidden, config.heads * config.head_dim
    return {
        "attention.qkv.weight": (inner + 2 * config.kv_heads * config.head_dim, width),
        "attention.out.weight": (width, inner),
        "attention.q_norm.weight": (config.head_dim,),
        "attention.k_norm.weight": (config.head_dim,),
        "feed_forward.w1.weight": (hidden, width),
        "feed_forward.w2.weight": (width, hidden),
        "feed_forward.w3.weight": (hidden, width),
        **{f"{norm}{number}.weight": (width,) for norm in ("attention_norm", "ffn_norm") for number in (1, 2)},
    }


def repeated(name: str, block: Shapes, count: int) -> Shapes:
    return {f"{name}.{number}.{leaf}": shape for number in range(count) for leaf, shape in block.items()}
