"""What a Qwen3 text encoder file or folder holds: sizes and key names, read from safetensors headers. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.anima.layout import Shapes, TensorSource, settings_of
from library.errors import CheckpointError
from library.files.key_check import compare_keys
from library.files.model_path import QWEN3, find_model_file, recognise_keys, with_article
from library.files.model_sizes import block_count, positive, scaled_float8_problem, usual_side
from library.files.safetensors_file import SafetensorsHeader, read_header

FLAG = "--qwen3"
# a Hugging Face folder's model (Qwen3ForCausalLM), the bare model, a part of a ComfyUI checkpoint; longest first
PREFIXES = ("text_encoders.qwen3_06b.transformer.model.", "model.", "")
BUNDLE_PREFIX = "text_encoders."  # a file with it holds other models too, under other prefixes
IGNORED = ("lm_head.weight", "model.lm_head.weight", "text_encoders.qwen3_06b.transformer.lm_head.weight")
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = "model.safetensors"
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # each complete set of them is a tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of the encoder; the defaults are those of Qwen3-0.6B."""

    width: int = 1024
    blocks: int = 28
    heads: int = 16
    key_heads: int = 8
    head_dim: int = 128
    mlp_hidden: int = 3072
    vocabulary: int = 151936
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class TextEncoderLayout:
    """A checked encoder. ``sources`` name the tensors to read."""

    path: Path
    config: TextEncoderConfig
    sources: tuple[TensorSource, ...]


def read_text_encoder_layout(value: str | Path | None, *, flag: str = FLAG) -> TextEncoderLayout:
    """Finds and checks what the user gave: one ``.safetensors`` file, or a Hugging Face folder (one file, or shards with index).

    Raises one CheckpointError about a missing, damaged or other model's file, or about all its wrong keys together.
    """
    path = find_model_file(flag, value, QWEN3, allow_folder=True)
    headers = [read_header(file) for file in _weight_files(path, flag)]
    keys = [key for header in headers for key in header.tensors]
    prefix = next((p for p in PREFIXES if any(re.match(rf"{re.escape(p)}layers\.\d+\.", key) for key in keys)), None)
    kind = recognise_keys(keys)
    if prefix is None or (kind not in (None, QWEN3) and not prefix.startswith(BUNDLE_PREFIX)):
        what = with_article(kind) if kind and kind != QWEN3 else "of another kind: no key is one of its layers"
        raise CheckpointError(f"{flag} {path} is {what}, not {with_article(QWEN3)}; give {flag} Qwen3-0.6B, a file or its folder")
    sources = tuple(_source(header, prefix) for header in headers)
    shapes: Shapes = {}
    for source in sources:
        shapes.update(source.shapes())
    config = config_from_shapes(shapes, _settings(headers[0], is_folder=path.is_dir()))
    if problems := scaled_float8_problem(shapes) or compare_keys(shapes, expected_shapes(config)):
        raise CheckpointError(f"{flag} {path} does not fit {with_article(QWEN3)}: {problems}")
    if config.heads % config.key_heads or config.head_dim % 2:
        raise CheckpointError(f"{flag} {path} has {config.heads} heads of {config.head_dim} over {config.key_heads} key heads: "
                              "the heads must be a multiple of the key heads and their width even")  # fmt: skip
    return TextEncoderLayout(path, config, sources)


def has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def config_from_shapes(shapes: Shapes, settings: Mapping[str, Any]) -> TextEncoderConfig:
    """Sizes from the shapes (each the one most tensors agree on), the rest from ``settings``, else as published."""
    published = TextEncoderConfig()
    layer = r"layers\.\d+\."
    head_dim = usual_side(shapes, layer + r"self_attn\.[qk]_norm\.weight", 0, published.head_dim)
    rope = settings.get("rope_parameters")  # transformers 5 nests what was rope_theta
    return TextEncoderConfig(
        width=usual_side(shapes, rf"({layer}\w+_layernorm|norm)\.weight", 0, published.width),
        blocks=block_count(shapes, "layers."),
        heads=max(usual_side(shapes, layer + r"self_attn\.q_proj\.weight", 0, 1) // max(head_dim, 1), 1),
        key_heads=max(usual_side(shapes, layer + r"self_attn\.[kv]_proj\.weight", 0, 1) // max(head_dim, 1), 1),
        head_dim=head_dim,
        mlp_hidden=usual_side(shapes, layer + r"mlp\.(gate|up)_proj\.weight", 0, published.mlp_hidden),
        vocabulary=usual_side(shapes, r"embed_tokens\.weight", 0, published.vocabulary),
        rope_theta=positive({**settings, **(rope if isinstance(rope, dict) else {})}, "rope_theta", published.rope_theta),
        norm_eps=positive(settings, "rms_norm_eps", published.norm_eps),
    )


def expected_shapes(config: TextEncoderConfig) -> Shapes:
    """Every name and shape of the encoder's ``state_dict``."""
    width, queries, keys = config.width, config.heads * config.head_dim, config.key_heads * config.head_dim
    layer: Shapes = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (config.mlp_hidden, width),
        "mlp.up_proj.weight": (config.mlp_hidden, width),
        "mlp.down_proj.weight": (width, config.mlp_hidden),
    }
    shapes: Shapes = {"embed_tokens.weight": (config.vocabulary, width), "norm.weight": (width,)}
    shapes.update({f"layers.{i}.{name}": shape for i in range(config.blocks) for name, shape in layer.items()})
    return shapes


def _weight_files(path: Path, flag: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / WEIGHT_FILE).is_file():
        return [path / WEIGHT_FILE]
    if not (path / INDEX_FILE).is_file():
        raise CheckpointError(f"{flag} {path} is a folder without {WEIGHT_FILE} or {INDEX_FILE}: give the folder of the {QWEN3}")
    try:
        names = sorted(set(json.loads((path / INDEX_FILE).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / INDEX_FILE} is damaged: download it again") from error
    if absent := [name for name in names if not (path / name).is_file()]:
        raise CheckpointError(f"{path / INDEX_FILE} names files that are not there: {', '.join(absent)}; download them too")
    return [path / name for name in names]


def _source(header: SafetensorsHeader, prefix: str) -> TensorSource:
    keys = (key for key in header.tensors if key not in IGNORED)
    if prefix.startswith(BUNDLE_PREFIX):
        keys = (key for key in keys if key.startswith(prefix))
    return TensorSource(header=header, names={key: key.removeprefix(prefix) for key in keys})


def _settings(header: SafetensorsHeader, *, is_folder: bool) -> dict[str, Any]:
    """The model's own config. A folder of single files may hold the ``config.json`` of any model: that one is passed over."""
    settings = settings_of(header)
    if settings.get("model_type", "qwen3") != "qwen3":
        if is_folder:
            raise CheckpointError(
                f"{header.path.parent} holds a {settings['model_type']!r} model by its config.json, not a Qwen3"
            )
        return {}
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind != "default":
        raise CheckpointError(
            f"{header.path.with_name('config.json')} asks for {kind!r} rotary scaling, which Qwen3-0.6B has not"
        )
    return settings
