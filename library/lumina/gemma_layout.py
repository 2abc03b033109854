"""The Gemma 2 text encoder of Lumina Image 2.0 in a file or folder: sizes and names. Needs no torch.

Modules are named as in transformers' Gemma2Model. Lumina reads the states before the last layer (``hidden_states[-2]``), so that
layer and the norm behind it are checked, as parts of a whole file, but neither loaded nor run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import CheckpointError
from library.files.json_text import header_settings, read_model_settings
from library.files.key_check import compare_keys
from library.files.model_path import GEMMA, described, recognise_keys
from library.files.model_sizes import block_count, positive, scaled_float8_problem, usual_side
from library.files.weights_source import Part, Piece, WeightsSource

BUNDLE = "text_encoders.gemma2_2b."  # of all-in-one files
BUNDLED_PREFIX = f"{BUNDLE}transformer.model."
MARK = re.compile(r"((?:.+\.)?)layers\.\d+\.pre_feedforward_layernorm\.weight")  # the name of Gemma 2 and 3 alone
SPIECE = "spiece_model"  # the tokenizer's file as a tensor of bytes
# what files hold besides the encoder
BESIDES = re.compile(r"lm_head\.weight|logit_scale|(.+\.)?spiece_model|.*rotary_emb\.inv_freq")
LAYERS = "layers."
SETTINGS = "gemma2"  # the encoder's object inside the ``config`` entry of a header
WANTED = "give Gemma 2 2B (gemma-2-2b), a file or its folder"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig:
    """Sizes of the encoder; the defaults are those of Gemma 2 2B."""

    width: int = 2304
    blocks: int = 26  # of the whole model; the last one is not loaded
    heads: int = 8
    key_heads: int = 4
    head_dim: int = 256
    mlp_hidden: int = 9216
    vocabulary: int = 256000
    query_scalar: int = 256  # logits are divided by its square root, instead of by that of head_dim
    softcap: float = 50.0  # of the attention's logits: softcap * tanh(logits / softcap)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    @property
    def used_blocks(self) -> int:
        return self.blocks - 1


PUBLISHED = GemmaConfig()


def find_gemma(names: Mapping[str, Any]) -> str | None:
    """What stands before the encoder's names in a file, whatever that is; None where it has none."""
    prefixes = {match.group(1) for name in names if (match := MARK.fullmatch(name))}
    return min(prefixes, key=lambda prefix: (len(prefix), prefix), default=None)


def gemma_part(source: WeightsSource) -> Part[GemmaConfig]:
    """The encoder in a file of its own, a folder's shards or an all-in-one file, whatever the order of its names.

    Raises one CheckpointError that lists all tensors that are missing, unexpected or of another shape, or names the other model
    that the file holds.
    """
    prefix = find_gemma(source.shapes)
    if prefix is None:
        kind = recognise_keys(source.shapes)
        what = described(kind) if kind else "a file without any name of Gemma 2's tensors"
        raise CheckpointError(f"{source.path} is {what}: {WANTED}")
    own = {name[len(prefix) :]: shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    own = {name: shape for name, shape in own.items() if not BESIDES.fullmatch(name)}
    if "layers.0.self_attn.q_norm.weight" in own:
        raise CheckpointError(f"{source.path} is a Gemma 3 text encoder, another generation: {WANTED}")
    settings = _settings(source, prefix)
    config = config_from_shapes(own, settings)
    if problem := next(_problems(config, own, _told_blocks(own, settings)), ""):
        raise CheckpointError(f"{source.path} is not a complete {GEMMA}: {problem}")
    pieces = {name: Piece(prefix + name) for name in expected_shapes(config) if _is_used(name, config)}
    return Part(source=source, config=config, pieces=pieces)


def _is_used(name: str, config: GemmaConfig) -> bool:
    return name != "norm.weight" and not name.startswith(f"layers.{config.used_blocks}.")


def _problems(config: GemmaConfig, shapes: Shapes, told_blocks: int | None) -> Iterator[str]:
    """The names first: sizes read from a file with wrong names may be guesses."""
    expected = expected_shapes(config)
    if block_count(shapes, LAYERS) < config.blocks:  # without the layer that is not used: the norm behind it may lack as well
        expected = {name: shape for name, shape in expected.items() if name in shapes or _is_used(name, config)}
    sizes = f"(read as {config.blocks} layers of width {config.width}, {config.heads} heads of {config.head_dim})"
    if text := scaled_float8_problem(shapes):
        yield text
    elif text := compare_keys(shapes, expected):
        yield f"{text} {sizes}"
    elif config.heads % config.key_heads or config.head_dim % 2:
        yield f"heads of keys must divide those of queries, and an even width must be theirs {sizes}: its config needs head_dim"
    elif told_blocks not in (None, config.blocks):
        yield f"it has {config.blocks} layers, where {told_blocks} are wanted (the last one may be left out) {sizes}"
    elif config.blocks < 2:
        yield f"it has {config.blocks} layer, of which the last is not used {sizes}"


# ---------------------------------------------------------------- sizes


def config_from_shapes(shapes: Shapes, settings: Mapping[str, Any]) -> GemmaConfig:
    """Sizes from the shapes (each the one most tensors agree on), the rest from ``settings``, else as published."""
    layer = r"layers\.\d+\."
    rows = usual_side(shapes, layer + r"self_attn\.q_proj\.weight", 0, PUBLISHED.heads * PUBLISHED.head_dim)
    key_rows = usual_side(shapes, layer + r"self_attn\.[kv]_proj\.weight", 0, rows // 2)
    head_dim = _head_dim(settings, rows)
    rope = settings.get("rope_parameters")  # transformers 5 nests what was rope_theta
    return GemmaConfig(
        width=_width(shapes),
        blocks=_blocks(shapes, settings),
        heads=max(rows // head_dim, 1),
        key_heads=max(key_rows // head_dim, 1),
        head_dim=head_dim,
        mlp_hidden=usual_side(shapes, layer + r"mlp\.(gate|up)_proj\.weight", 0, PUBLISHED.mlp_hidden),
        vocabulary=usual_side(shapes, r"embed_tokens\.weight", 0, PUBLISHED.vocabulary),
        query_scalar=max(int(positive(settings, "query_pre_attn_scalar", head_dim)), 1),
        softcap=positive(settings, "attn_logit_softcapping", PUBLISHED.softcap),
        rope_theta=positive({**settings, **(rope if isinstance(rope, dict) else {})}, "rope_theta", PUBLISHED.rope_theta),
        norm_eps=positive(settings, "rms_norm_eps", PUBLISHED.norm_eps),
    )


def _blocks(shapes: Shapes, settings: Mapping[str, Any]) -> int:
    """Of the whole model: a file may leave out the last layer, which is not used."""
    found, told = block_count(shapes, LAYERS), _told_blocks(shapes, settings)
    return told if told == found + 1 else found


def _told_blocks(shapes: Shapes, settings: Mapping[str, Any]) -> int | None:
    """How many layers the whole model has, by its config or because its width is that of the published one; None: not known."""
    if "num_hidden_layers" in settings:
        return max(int(positive(settings, "num_hidden_layers", PUBLISHED.blocks)), 1)
    return PUBLISHED.blocks if _width(shapes) == PUBLISHED.width else None


def _width(shapes: Shapes) -> int:
    return usual_side(shapes, r"(layers\.\d+\.\w+_layernorm|norm)\.weight", 0, PUBLISHED.width)


def _head_dim(settings: Mapping[str, Any], rows: int) -> int:
    """Width and heads do not tell it. ``rows``: of the queries."""
    if "head_dim" in settings:
        return max(int(positive(settings, "head_dim", PUBLISHED.head_dim)), 1)
    if "heads" in settings:
        return max(rows // int(max(positive(settings, "heads", PUBLISHED.heads), 1)), 1)
    return min(PUBLISHED.head_dim, rows)


def _settings(source: WeightsSource, prefix: str) -> dict[str, Any]:
    """What shapes cannot tell: ``gemma2`` of the ``config`` entry in the file's metadata, or the entry itself in a file of this
    model alone; for a folder, its config.json. Raises CheckpointError where that says that it is another model."""
    path = Path(source.path)
    found = read_model_settings(path / "config.json") if path.is_dir() else header_settings(source.metadata)
    kind = found.get("model_type", "gemma2")
    if path.is_dir() and kind != "gemma2":
        raise CheckpointError(f"{path} holds a {kind!r} model by its config.json, not a Gemma 2: {WANTED}")
    inner = found.get(SETTINGS, {} if prefix.startswith(BUNDLE) else found)
    return inner if isinstance(inner, dict) else {}


# ---------------------------------------------------------------- names


def expected_shapes(config: GemmaConfig) -> Shapes:
    """Every name and shape of the whole model's ``state_dict``, the unused last layer included."""
    width, queries, keys = config.width, config.heads * config.head_dim, config.key_heads * config.head_dim
    layer: Shapes = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "post_attention_layernorm.weight": (width,),
        "pre_feedforward_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (config.mlp_hidden, width),
        "mlp.up_proj.weight": (config.mlp_hidden, width),
        "mlp.down_proj.weight": (width, config.mlp_hidden),
        "post_feedforward_layernorm.weight": (width,),
    }
    shapes: Shapes = {"embed_tokens.weight": (config.vocabulary, width), "norm.weight": (width,)}
    shapes.update({f"layers.{i}.{name}": shape for i in range(config.blocks) for name, shape in layer.items()})
    return shapes
