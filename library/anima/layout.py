"""Anima's DiT and LLM adapter as files: sizes, key names and shapes, read from safetensors headers. Needs no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import CheckpointError
from library.files.key_check import compare_keys
from library.files.model_path import ANIMA_DIT, COSMOS_DIT, LLM_ADAPTER, described, find_model_file, recognise, with_article
from library.files.model_sizes import block_count, positive, scaled_float8_problem, usual_side
from library.files.safetensors_file import SafetensorsHeader, read_header

DIT_FLAG, ADAPTER_FLAG = "--pretrained_model_name_or_path", "--llm_adapter_path"
PREFIXES = ("model.diffusion_model.net.", "model.diffusion_model.", "diffusion_model.", "net.", "")  # longest first
BUNDLE_PREFIXES = PREFIXES[:2]  # files with these hold other models too, under other prefixes
ADAPTER_PREFIX = "llm_adapter."
RECOMPUTED = "pos_embedder."  # rotary buffers that some files carry
WEIGHT_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
VAE_SCALE = 8  # pixels per latent side
CONTEXT_ROWS = 512  # of text; the model was trained with this many, and zero rows take part in attention
MIN_HEAD_DIM = 12  # below that the height and width shares of the rotary channels are too narrow for their formula

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Sizes of the LLM adapter; the defaults are the published ones."""

    vocabulary: int = 32128
    width: int = 1024
    source_width: int = 1024  # of the Qwen3 states
    blocks: int = 6
    heads: int = 16
    head_dim: int = 64
    mlp_hidden: int = 4096
    rope_theta: float = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig:
    """Sizes of the DiT; the defaults are the published ones (2B parameters)."""

    width: int = 2048
    blocks: int = 28
    heads: int = 16
    head_dim: int = 128
    mlp_hidden: int = 8192
    adaln_dim: int = 256  # inner width of the low-rank modulation layers
    context_dim: int = 1024
    in_channels: int = 16  # without the padding mask's channel
    patch: int = 2
    rope_h_ratio: float = 4.0  # how far positions are stretched beyond those of pretraining
    rope_w_ratio: float = 4.0
    adapter: AdapterConfig | None = AdapterConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """One file and the tensors to take from it: key in the file -> name in ``AnimaDenoiser.state_dict()``."""

    header: SafetensorsHeader
    names: dict[str, str]

    def shapes(self) -> Shapes:
        return {name: self.header.tensors[key].shape for key, name in self.names.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserLayout:
    """A checked DiT with its adapter: every tensor that the model needs is there in the right shape, and no other."""

    config: DenoiserConfig
    sources: tuple[TensorSource, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(source.header.path for source in self.sources)


def read_denoiser_layout(path: str | Path | None, adapter_path: str | Path | None = None) -> DenoiserLayout:
    """Reads and checks the headers of the DiT and, where given, of a separate adapter, which then wins over the DiT's own.

    Raises CheckpointError when a file is missing, damaged, of another architecture, without an adapter, or when keys are
    missing, unexpected or misshapen; all keys of all files are in that one error.
    """
    header = read_header(find_model_file(DIT_FLAG, path, ANIMA_DIT))
    dit = dit_source(header)
    if not adapter_path:
        return checked_layout((dit,), dit)
    adapter = adapter_source(read_header(find_model_file(ADAPTER_FLAG, adapter_path, LLM_ADAPTER)))
    own = {key: name for key, name in dit.names.items() if not name.startswith(ADAPTER_PREFIX)}
    return checked_layout((TensorSource(header=header, names=own), adapter), adapter)


def dit_source(header: SafetensorsHeader) -> TensorSource:
    """The DiT's tensors in the file, whatever their prefix. Raises CheckpointError for a file of another kind."""
    kind = recognise(header)
    if kind not in (None, ANIMA_DIT, COSMOS_DIT):
        raise CheckpointError(f"{DIT_FLAG} {header.path} is {described(str(kind))}, not an Anima DiT; give it the Anima DiT")
    prefix = next((p for p in PREFIXES if any(is_dit_key(key, p) for key in header.tensors)), None)
    if prefix is None:
        raise CheckpointError(
            f"{DIT_FLAG} {header.path} is not an Anima DiT: none of its {len(header.tensors):,} keys is known"
            f"{', for example ' + next(iter(header.tensors)) if header.tensors else ''}"
        )
    keys = (key for key in header.tensors if key.startswith(prefix) or prefix not in BUNDLE_PREFIXES)
    names = {key: key.removeprefix(prefix) for key in keys}
    return TensorSource(header=header, names={key: name for key, name in names.items() if not name.startswith(RECOMPUTED)})


def is_dit_key(key: str, prefix: str) -> bool:
    return key.startswith(tuple(prefix + root for root in ("x_embedder.", "t_embedder.", "blocks.", "final_layer.")))


def adapter_source(header: SafetensorsHeader) -> TensorSource:
    """The adapter's tensors in a file of its own, or in a DiT file given in its place."""
    kind = recognise(header)
    if kind not in (None, LLM_ADAPTER, ANIMA_DIT):
        raise CheckpointError(
            f"{ADAPTER_FLAG} {header.path} is {with_article(str(kind))}, not {with_article(LLM_ADAPTER)}; "
            f"give {ADAPTER_FLAG} the adapter's file"
        )
    marked = {key: key[key.index(ADAPTER_PREFIX) :] for key in header.tensors if ADAPTER_PREFIX in key}
    return TensorSource(header=header, names=marked or {key: ADAPTER_PREFIX + key for key in header.tensors})


def checked_layout(sources: tuple[TensorSource, ...], adapter: TensorSource) -> DenoiserLayout:
    shapes: Shapes = {}
    for source in sources:
        shapes.update(source.shapes())
    if not any(name.startswith(ADAPTER_PREFIX) for name in shapes):
        raise CheckpointError(
            f"{DIT_FLAG} {sources[0].header.path} has no LLM adapter (no {ADAPTER_PREFIX}* keys); give its file to {ADAPTER_FLAG}"
        )
    config = config_from_shapes(shapes, settings_of(sources[0].header), settings_of(adapter.header))
    files = " with ".join(str(source.header.path) for source in sources)
    problems = [*layout_problems(config, shapes), *dtype_problems(sources)]
    if problems:
        raise CheckpointError(*(f"{files} does not fit an Anima DiT: {problem}" for problem in problems))
    return DenoiserLayout(config=config, sources=sources)


def layout_problems(config: DenoiserConfig, shapes: Shapes) -> Iterator[str]:
    """The keys first: sizes read from a file with wrong keys may be guesses."""
    sizes = f"(read as {config.blocks} blocks of width {config.width}, {config.heads} heads of {config.head_dim})"
    if text := scaled_float8_problem(shapes):
        yield text
    elif text := compare_keys(shapes, expected_shapes(config)):
        yield f"{text} {sizes}"
    elif config.head_dim < MIN_HEAD_DIM or config.head_dim % 2:
        yield f"its head width is {config.head_dim}; even numbers from {MIN_HEAD_DIM} on are allowed"
    elif config.adapter is not None and config.adapter.head_dim % 2:
        yield f"its adapter's head width is {config.adapter.head_dim}; even numbers are allowed"


def dtype_problems(sources: tuple[TensorSource, ...]) -> Iterator[str]:
    used = Counter(source.header.tensors[key].dtype for source in sources for key in source.names)
    for dtype in sorted(set(used) - WEIGHT_DTYPES):
        yield f"{used[dtype]:,} tensors are stored as {dtype}; float32, float16, bfloat16 and float8 are allowed"


# ---------------------------------------------------------------- sizes


def config_from_shapes(shapes: Shapes, settings: Mapping[str, Any], adapter_settings: Mapping[str, Any]) -> DenoiserConfig:
    """Sizes from the shapes, the rest from ``settings``, else as published. Each size is the one most tensors agree on."""
    published = DenoiserConfig()
    dit = {name: shape for name, shape in shapes.items() if not name.startswith(ADAPTER_PREFIX)}
    width = usual_side(dit, r"(x_embedder\.proj\.1|t_embedding_norm|blocks\.\d+\.mlp\.layer2)\.weight", 0, published.width)
    head_dim = usual_side(dit, r"blocks\.\d+\.(self|cross)_attn\.[qk]_norm\.weight", 0, published.head_dim)
    inner = usual_side(dit, r"blocks\.\d+\.(self|cross)_attn\.q_proj\.weight", 0, width)
    channels, patch = channels_and_patch(dit)
    return DenoiserConfig(
        width=width,
        blocks=block_count(dit, "blocks."),
        heads=max(inner // max(head_dim, 1), 1),
        head_dim=head_dim,
        mlp_hidden=usual_side(dit, r"blocks\.\d+\.mlp\.layer1\.weight", 0, published.mlp_hidden),
        adaln_dim=usual_side(dit, r"blocks\.\d+\.adaln_modulation_\w+\.1\.weight", 0, published.adaln_dim),
        context_dim=usual_side(dit, r"blocks\.\d+\.cross_attn\.[kv]_proj\.weight", 1, published.context_dim),
        in_channels=channels,
        patch=patch,
        rope_h_ratio=positive(settings, "rope_h_extrapolation_ratio", published.rope_h_ratio),
        rope_w_ratio=positive(settings, "rope_w_extrapolation_ratio", published.rope_w_ratio),
        adapter=adapter_from_shapes(shapes, adapter_settings),
    )


def adapter_from_shapes(shapes: Shapes, settings: Mapping[str, Any]) -> AdapterConfig:
    published = AdapterConfig()
    own = {name.removeprefix(ADAPTER_PREFIX): shape for name, shape in shapes.items() if name.startswith(ADAPTER_PREFIX)}
    width = usual_side(own, r"embed\.weight|blocks\.\d+\.self_attn\.[qkv]_proj\.weight", 1, published.width)
    head_dim = usual_side(own, r"blocks\.\d+\.(self|cross)_attn\.[qk]_norm\.weight", 0, published.head_dim)
    inner = usual_side(own, r"blocks\.\d+\.(self|cross)_attn\.q_proj\.weight", 0, width)
    nested = settings.get("llm_adapter")
    return AdapterConfig(
        vocabulary=usual_side(own, r"embed\.weight", 0, published.vocabulary),
        width=width,
        source_width=usual_side(own, r"blocks\.\d+\.cross_attn\.[kv]_proj\.weight", 1, published.source_width),
        blocks=block_count(own, "blocks."),
        heads=max(inner // max(head_dim, 1), 1),
        head_dim=head_dim,
        mlp_hidden=usual_side(own, r"blocks\.\d+\.mlp\.0\.(weight|bias)", 0, published.mlp_hidden),
        rope_theta=positive(nested if isinstance(nested, dict) else {}, "rope_theta", published.rope_theta),
    )


def channels_and_patch(shapes: Shapes) -> tuple[int, int]:
    """From (C + 1) * p * p input features, the mask's channel included, and C * p * p output features."""
    published = DenoiserConfig()
    area = published.patch**2
    outputs = usual_side(shapes, r"final_layer\.linear\.weight", 0, published.in_channels * area)
    inputs = usual_side(shapes, r"x_embedder\.proj\.1\.weight", 1, outputs + area)
    patch = max(math.isqrt(max(inputs - outputs, 0)), 1)
    return max(outputs // patch**2, 1), patch


def settings_of(header: SafetensorsHeader) -> dict[str, Any]:
    """What shapes cannot tell: ``config.json`` beside the file, else the JSON entry ``config`` in its header, else nothing."""
    beside = header.path.with_name("config.json")
    try:
        text = beside.read_text(encoding="utf-8") if beside.is_file() else header.metadata.get("config")
        settings = json.loads(text) if text else {}
    except (OSError, ValueError) as error:
        where = str(beside) if beside.is_file() else f"the config entry of {header.path}"
        raise CheckpointError(f"{where} is not readable as JSON ({error}); mend or remove it") from error
    return settings if isinstance(settings, dict) else {}


# ---------------------------------------------------------------- names


def expected_shapes(config: DenoiserConfig) -> Shapes:
    """Every name and shape of ``AnimaDenoiser(config).state_dict()``."""
    width, area, inner = config.width, config.patch**2, config.heads * config.head_dim
    shapes: Shapes = {
        "x_embedder.proj.1.weight": (width, (config.in_channels + 1) * area),
        "t_embedder.1.linear_1.weight": (width, width),
        "t_embedder.1.linear_2.weight": (3 * width, width),
        "t_embedding_norm.weight": (width,),
        "final_layer.linear.weight": (config.in_channels * area, width),
        "final_layer.adaln_modulation.1.weight": (config.adaln_dim, width),
        "final_layer.adaln_modulation.2.weight": (2 * width, config.adaln_dim),
    }
    block: Shapes = {
        **attention_shapes("self_attn", (width, width, inner, config.head_dim), out="output_proj"),
        **attention_shapes("cross_attn", (width, config.context_dim, inner, config.head_dim), out="output_proj"),
        "mlp.layer1.weight": (config.mlp_hidden, width),
        "mlp.layer2.weight": (width, config.mlp_hidden),
    }
    for part in ("self_attn", "cross_attn", "mlp"):
        block[f"adaln_modulation_{part}.1.weight"] = (config.adaln_dim, width)
        block[f"adaln_modulation_{part}.2.weight"] = (3 * width, config.adaln_dim)
    shapes.update(repeated(block, config.blocks))
    if config.adapter is not None:
        adapter = adapter_shapes(config.adapter, config.context_dim)
        shapes.update({ADAPTER_PREFIX + name: shape for name, shape in adapter.items()})
    return shapes


def adapter_shapes(config: AdapterConfig, context_dim: int) -> Shapes:
    width, inner = config.width, config.heads * config.head_dim
    block: Shapes = {
        **{f"norm_{part}.weight": (width,) for part in ("self_attn", "cross_attn", "mlp")},
        **attention_shapes("self_attn", (width, width, inner, config.head_dim), out="o_proj"),
        **attention_shapes("cross_attn", (width, config.source_width, inner, config.head_dim), out="o_proj"),
        "mlp.0.weight": (config.mlp_hidden, width),
        "mlp.0.bias": (config.mlp_hidden,),
        "mlp.2.weight": (width, config.mlp_hidden),
        "mlp.2.bias": (width,),
    }
    return {
        "embed.weight": (config.vocabulary, width),
        **repeated(block, config.blocks),
        "out_proj.weight": (context_dim, width),
        "out_proj.bias": (context_dim,),
        "norm.weight": (context_dim,),
    }


def attention_shapes(name: str, sizes: tuple[int, int, int, int], *, out: str) -> Shapes:
    """sizes: query width, key width, heads * head width, head width."""
    query_dim, key_dim, inner, head_dim = sizes
    return {
        f"{name}.q_proj.weight": (inner, query_dim),
        f"{name}.k_proj.weight": (inner, key_dim),
        f"{name}.v_proj.weight": (inner, key_dim),
        f"{name}.{out}.weight": (query_dim, inner),
        f"{name}.q_norm.weight": (head_dim,),
        f"{name}.k_norm.weight": (head_dim,),
    }


def repeated(block: Shapes, blocks: int) -> Shapes:
    return {f"blocks.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
