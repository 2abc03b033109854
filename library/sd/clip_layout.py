"""The CLIP text encoders of a checkpoint: sizes and names, read off names and shapes. Needs no torch.

Modules are named as in ``ClipTextModel`` of library/sd/clip.py, which are the names of transformers. Files have those ("hf"), or
OpenCLIP's ("open_clip"), which keeps q, k and v below each other in one tensor and the projection as the matrix P of x @ P.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.errors import CheckpointError
from library.files.json_text import header_settings, read_model_settings
from library.files.key_check import compare_keys
from library.files.model_path import recognise_keys, with_article
from library.files.weights_source import THIRDS, Part, Piece, WeightsSource, changed_shape

Layout = Literal["hf", "open_clip"]
Shapes = dict[str, tuple[int, ...]]

HEAD_DIM = 64  # of all published CLIP text encoders
POSITIONS, VOCABULARY = 77, 49408  # that CLIP's tokenizer needs
ACTIVATIONS = QUICK_GELU, GELU = "quick_gelu", "gelu"  # of CLIP-L; of OpenCLIP's H and G. In transformers' words
PROJECTION = "text_projection.weight"
PROJECTION_MATRIX = Piece("text_projection", "transposed")  # the same as a bare matrix
ALONE = ("", "transformer.")  # prefixes in files of nothing but an encoder
HF_LEVEL = "text_model."  # a level of hf names that not all writers keep
LAYER_NAMES = {"hf": "encoder.layers.", "open_clip": "transformer.resblocks."}
OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# what files hold besides the encoder: tables that are rebuilt, the scale of CLIP's loss, the half of CLIP that sees images
BESIDES = re.compile(r"(text_model\.)?embeddings\.position_ids|logit_scale|attn_mask|(vision_model|visual|visual_projection)\..*")
SCALED_FLOAT8 = (".scale_weight", ".weight_scale", "scaled_fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Sizes of a text encoder; the defaults are those of CLIP ViT-L/14."""

    width: int = 768
    layers: int = 12  # that are loaded
    heads: int = 12
    mlp_width: int = 3072
    vocabulary: int = VOCABULARY
    positions: int = POSITIONS
    activation: str = QUICK_GELU
    projection: int | None = None  # width of the pooled vector; None: nothing is projected


def clip_part(source: WeightsSource, *, prefix: str, layout: Layout, keep_layers: int | None = None) -> Part[ClipConfig]:
    """The text encoder whose tensors are called ``prefix`` + a name in ``layout``.

    ``keep_layers``: load only the first that many; -1 = all but the last, as Stable Diffusion 2 does with the 24 of OpenCLIP-H;
    None = all. A pooled vector is made of the last layer, so the projection is loaded only where all are.
    Raises one CheckpointError that lists all tensors that are missing, unexpected or of another shape.
    """
    found = {name.removeprefix(prefix): shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    if scale := next((name for name in found if name.endswith(SCALED_FLOAT8)), None):
        raise CheckpointError(f"{source.path}: its text encoder is float8 with scales of its own ({prefix}{scale}), which is not "
                              "read; give the float16 or bfloat16 file (--fp8_base keeps its weights in 8 bits)")  # fmt: skip
    in_file = _layer_count(found, layout)
    if not in_file:
        kind = recognise_keys(source.shapes)
        what = f"; it is {with_article(kind)}" if kind else ""
        raise CheckpointError(
            f"{source.path} has no text encoder: no tensor is called {prefix}{LAYER_NAMES[layout]}0 and so on{what}"
        )
    layers = in_file if keep_layers is None else keep_layers % in_file if keep_layers < 0 else min(keep_layers, in_file)
    is_cut = keep_layers is not None
    found = {name: shape for name, shape in found.items() if _is_needed(name, layout, layers, is_cut=is_cut)}
    # OpenCLIP always has a projection; whether transformers' does depends on what the file was made for
    frame = ClipConfig(
        layers=layers,
        projection=1 if {PROJECTION, PROJECTION_MATRIX.key} & set(found) or (layout == "open_clip" and not is_cut) else None,
    )
    config = _with_sizes(frame, found, layout, clip_settings(source, prefix))
    pieces = clip_pieces(config, layout, found)
    expected = {
        prefix + pieces[name].key: _file_shape(shape, pieces[name].change) for name, shape in expected_shapes(config).items()
    }
    problem = compare_keys({prefix + name: shape for name, shape in found.items()}, expected)
    if problem := problem or next(_size_problems(config), ""):
        raise CheckpointError(f"{source.path}: its text encoder is not a CLIP of {layers} layers: {problem}")
    return Part(source=source, config=config, pieces={name: Piece(prefix + p.key, p.change) for name, p in pieces.items()})


def expected_shapes(config: ClipConfig) -> Shapes:
    """Every name and shape of ``ClipTextModel(config).state_dict()``."""
    width, mlp = config.width, config.mlp_width
    layer: Shapes = {f"self_attn.{name}_proj.weight": (width, width) for name in (*THIRDS, "out")}
    layer |= {f"self_attn.{name}_proj.bias": (width,) for name in (*THIRDS, "out")}
    layer |= {f"layer_norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    layer |= {"mlp.fc1.weight": (mlp, width), "mlp.fc1.bias": (mlp,), "mlp.fc2.weight": (width, mlp), "mlp.fc2.bias": (width,)}
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (config.vocabulary, width),
        "text_model.embeddings.position_embedding.weight": (config.positions, width),
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
    }
    shapes |= {f"text_model.encoder.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()}
    return shapes if config.projection is None else {**shapes, PROJECTION: (config.projection, width)}


def clip_pieces(config: ClipConfig, layout: Layout, found: Container[str] = ()) -> dict[str, Piece]:
    """Where each tensor of the module lies in a file of ``layout``; ``found``: the file's names, where writers differ."""
    find = _hf_piece if layout == "hf" else _open_clip_piece
    return {name: find(name, found) for name in expected_shapes(config)}


def _size_problems(config: ClipConfig) -> Iterator[str]:
    if config.width % config.heads:
        yield f"its width {config.width} cannot be cut into {config.heads} heads: its config needs heads"
    if config.positions < POSITIONS:
        yield f"it takes {config.positions} tokens, not {POSITIONS}"
    if config.vocabulary < VOCABULARY:
        yield f"it knows {config.vocabulary:,} tokens, the tokenizer makes {VOCABULARY:,}"


def clip_skip_problem(clip_skip: int | None, layers: int) -> str | None:
    """Why an encoder of that many layers cannot do with ``--clip_skip``; None where it can."""
    if clip_skip is None or 1 <= clip_skip <= layers:
        return None
    return f"--clip_skip is {clip_skip}, but the text encoder has {layers} layers: give a number from 1 (its output) to {layers}"


# ---------------------------------------------------------------- names


def _hf_piece(name: str, found: Container[str]) -> Piece:
    if name == PROJECTION:
        return _projection_piece(found, usual=Piece(PROJECTION))
    bare = name.removeprefix(HF_LEVEL)
    return Piece(bare if bare in found else name)


def _open_clip_piece(name: str, found: Container[str]) -> Piece:
    if name == PROJECTION:
        return _projection_piece(found, usual=PROJECTION_MATRIX)
    bare = name.removeprefix(HF_LEVEL)
    if bare in OPEN_CLIP_NAMES:
        return Piece(OPEN_CLIP_NAMES[bare])
    start, rest = "", bare
    if match := re.match(r"encoder\.layers\.(\d+)\.", bare):
        start, rest = f"{LAYER_NAMES['open_clip']}{match[1]}.", bare[match.end() :]
    if third := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
        return Piece(f"{start}attn.in_proj_{third[2]}", third[1])
    module, _, kind = rest.rpartition(".")
    return Piece(f"{start}{OPEN_CLIP_NAMES[module]}.{kind}")


def _projection_piece(found: Container[str], *, usual: Piece) -> Piece:
    """The weight of a Linear, or a matrix P for x @ P: which of the two, the name tells in both layouts."""
    return next((piece for piece in (Piece(PROJECTION), PROJECTION_MATRIX) if piece.key in found), usual)


def _is_needed(name: str, layout: Layout, layers: int, *, is_cut: bool) -> bool:
    if BESIDES.fullmatch(name) or (is_cut and name in (PROJECTION, PROJECTION_MATRIX.key)):
        return False
    number = _layer_number(name, layout)
    return number is None or number < layers


def _layer_count(names: Iterable[str], layout: Layout) -> int:
    return 1 + max((number for name in names if (number := _layer_number(name, layout)) is not None), default=-1)


def _layer_number(name: str, layout: Layout) -> int | None:
    bare = name.removeprefix(HF_LEVEL) if layout == "hf" else name
    match = re.match(re.escape(LAYER_NAMES[layout]) + r"(\d+)\.", bare)
    return int(match[1]) if match else None


# ---------------------------------------------------------------- sizes


def _file_shape(shape: tuple[int, ...], change: str) -> tuple[int, ...]:
    """Of the tensor in the file of which ``change`` makes a module's tensor of ``shape``."""
    if change in THIRDS:
        return (len(THIRDS) * shape[0], *shape[1:])
    return shape[::-1] if change == "transposed" else shape


def _with_sizes(frame: ClipConfig, found: Shapes, layout: Layout, settings: Mapping[str, Any]) -> ClipConfig:
    """The frame's model with the sizes that most tensors of ``found`` agree on and what ``settings`` says, else as published."""
    pieces = clip_pieces(frame, layout, found)
    shapes = {name: changed_shape(found[piece.key], piece.change) for name, piece in pieces.items() if piece.key in found}
    width = _usual_side(shapes, r".*layer_norm[12]?\.weight", 0, frame.width)
    return ClipConfig(
        width=width,
        layers=frame.layers,
        heads=_positive(settings, "heads", max(width // HEAD_DIM, 1)),
        mlp_width=_usual_side(shapes, r".*\.mlp\.(fc1\.weight|fc1\.bias)", 0, frame.mlp_width),
        vocabulary=_usual_side(shapes, r".*\.token_embedding\.weight", 0, frame.vocabulary),
        positions=_usual_side(shapes, r".*\.position_embedding\.weight", 0, frame.positions),
        activation=_activation(settings, QUICK_GELU if layout == "hf" and width <= frame.width else GELU),
        projection=_usual_side(shapes, re.escape(PROJECTION), 0, width) if frame.projection else None,
    )


def _usual_side(shapes: Shapes, pattern: str, axis: int, published: int) -> int:
    sides = Counter(shape[axis] for name, shape in shapes.items() if len(shape) > axis and re.fullmatch(pattern, name))
    return sides.most_common(1)[0][0] if sides else published


# ---------------------------------------------------------------- settings


def clip_settings(source: WeightsSource, prefix: str) -> dict[str, Any]:
    """What shapes cannot tell: the entry ``config`` of the file's metadata, or the config.json of the encoder's own folder."""
    if "config" in source.metadata:
        own = _own_settings(header_settings(source.metadata), prefix)
        return own if isinstance(own, dict) else {}
    path = Path(source.path)
    folder = path if path.is_dir() else path.parent
    given = {} if prefix else read_model_settings(folder / "config.json")  # beside a file of several models may lie any model's
    names = {"heads": "num_attention_heads", "activation": "hidden_act"}
    return {name: given[theirs] for name, theirs in names.items() if theirs in given}


def _own_settings(settings: Mapping[str, Any], prefix: str) -> Any:
    """Of a header's settings those of one encoder: SD3's are listed by name, the others of one file in their order, and a file of
    nothing but an encoder may have them at the top."""
    if named := re.search(r"\b(clip_[lg])\.", prefix):
        return settings.get(named[1])
    if prefix in ALONE and "text" not in settings:
        return settings
    listed = settings.get("text")
    match = re.search(r"\bembedders\.(\d+)\.", prefix)  # SDXL has two text encoders in a file
    number = int(match[1]) if match else 0
    return listed[number] if isinstance(listed, list) and len(listed) > number else None


def _positive(settings: Mapping[str, Any], name: str, published: int) -> int:
    value = settings.get(name, published)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"the text encoder's config says {name} = {value!r}; give a whole number above 0")
    return value


def _activation(settings: Mapping[str, Any], published: str) -> str:
    value = settings.get("activation", published)
    if value not in ACTIVATIONS:
        raise CheckpointError(f"the text encoder's config says activation = {value!r}; known are {' and '.join(ACTIVATIONS)}")
    return value
