"""The T5 text encoder of SD3: sizes and names, read off names and shapes. Needs no torch.

Modules are named as in ``T5Encoder`` of library/sd3/t5.py, which are the names of transformers' T5EncoderModel, T5 v1.1
(arXiv 1910.10683, 2002.05202). Files have those names. The token embedding is one tensor of two names, of which a file has
either or both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from library.errors import CheckpointError
from library.files.key_check import compare_keys
from library.files.model_path import recognise_keys, with_article
from library.files.model_sizes import block_count, scaled_float8_problem, usual_side
from library.files.weights_source import Part, Piece, WeightsSource

Shapes = dict[str, tuple[int, ...]]

KIND = "T5 text encoder"
TOKENS = 32100  # pieces of the tokenizer, which comes with the project; files have some more rows
ROWS = 32128
EMBEDDING = "encoder.embed_tokens.weight"
BLOCKS = "encoder.block."
SHARED = "shared.weight"  # the embedding's other name
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # of the first block alone; all blocks use it
# what files hold besides: the half of T5 that writes texts, marks of other programs, the tokenizer
BESIDES = re.compile(r"decoder\..*|lm_head\.weight|logit_scale|spiece_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    """Sizes of the encoder; the defaults are those of T5 v1.1 XXL."""

    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10240
    vocabulary: int = ROWS
    buckets: int = 32  # of distances between tokens, each with a number for each head
    max_distance: int = 128  # tokens; what is farther falls into the last bucket
    norm_eps: float = 1e-6


PUBLISHED = T5Config()


def t5_part(source: WeightsSource, *, prefix: str) -> Part[T5Config]:
    """The encoder whose tensors are called ``prefix`` + a name; all sizes come from the tensors.

    Raises one CheckpointError that lists all tensors that are missing, unexpected or of another shape, or names the other model
    that the file holds.
    """
    found = {name.removeprefix(prefix): shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    if problem := scaled_float8_problem(found):
        raise CheckpointError(f"{source.path}: {problem}")
    if not any(name.startswith(BLOCKS) for name in found):
        raise CheckpointError(
            f"{source.path} has no {KIND}: no tensor is called {prefix}{BLOCKS}0 and so on{_what_it_is(source)}"
        )
    layers = block_count(found, BLOCKS)
    found = {name: shape for name, shape in found.items() if not BESIDES.fullmatch(name)}
    config = _with_sizes(found, layers)
    pieces = t5_pieces(config, embedding=EMBEDDING if EMBEDDING in found else SHARED)
    found = {name: shape for name, shape in found.items() if name not in {EMBEDDING, SHARED} - {pieces[EMBEDDING].key}}
    problem = compare_keys(
        {prefix + name: shape for name, shape in found.items()},
        {prefix + pieces[name].key: shape for name, shape in expected_shapes(config).items()},
    )
    if problem := problem or next(_size_problems(config), ""):
        raise CheckpointError(f"{source.path}: its text encoder is not a T5 v1.1 of {layers} layers: {problem}")
    return Part(source=source, config=config, pieces={name: Piece(prefix + piece.key) for name, piece in pieces.items()})


def expected_shapes(config: T5Config) -> Shapes:
    """Every name and shape of ``T5Encoder(config).state_dict()``."""
    width, mlp, inner = config.width, config.mlp_width, config.heads * config.head_dim
    layer: Shapes = {f"layer.0.SelfAttention.{name}.weight": (inner, width) for name in ("q", "k", "v")}
    layer |= {"layer.0.SelfAttention.o.weight": (width, inner), "layer.0.layer_norm.weight": (width,)}
    layer |= {f"layer.1.DenseReluDense.{name}.weight": (mlp, width) for name in ("wi_0", "wi_1")}
    layer |= {"layer.1.DenseReluDense.wo.weight": (width, mlp), "layer.1.layer_norm.weight": (width,)}
    shapes: Shapes = {EMBEDDING: (config.vocabulary, width), BIAS: (config.buckets, config.heads)}
    shapes |= {f"encoder.block.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()}
    return {**shapes, "encoder.final_layer_norm.weight": (width,)}


def t5_pieces(config: T5Config, *, embedding: str = SHARED) -> dict[str, Piece]:
    """Where each tensor of the module lies in a file; ``embedding``: the name that the token embedding has there."""
    return {name: Piece(embedding if name == EMBEDDING else name) for name in expected_shapes(config)}


def _with_sizes(found: Shapes, layers: int) -> T5Config:
    """The sizes that most tensors agree on, else as published."""
    heads = usual_side(found, re.escape(BIAS), 1, PUBLISHED.heads)
    inner = usual_side(found, r".*\.SelfAttention\.[qkv]\.weight", 0, PUBLISHED.heads * PUBLISHED.head_dim)
    return T5Config(
        width=usual_side(found, r".*layer_norm\.weight", 0, PUBLISHED.width),
        layers=layers,
        heads=heads,
        head_dim=max(inner // max(heads, 1), 1),
        mlp_width=usual_side(found, r".*\.DenseReluDense\.wi_[01]\.weight", 0, PUBLISHED.mlp_width),
        vocabulary=usual_side(found, rf"{re.escape(EMBEDDING)}|{re.escape(SHARED)}", 0, PUBLISHED.vocabulary),
        buckets=usual_side(found, re.escape(BIAS), 0, PUBLISHED.buckets),
    )


def _size_problems(config: T5Config) -> Iterator[str]:
    if not TOKENS <= config.vocabulary <= ROWS:
        yield f"it knows {config.vocabulary:,} tokens, the tokenizer of T5 v1.1 makes {TOKENS:,} (files have up to {ROWS:,} rows)"
    if config.buckets < 4 or config.buckets % 4:
        yield f"it has {config.buckets} buckets of distances, which must be a multiple of 4"


def _what_it_is(source: WeightsSource) -> str:
    kind = recognise_keys(source.shapes)
    return f"; it is {with_article(kind)}" if kind else ""
