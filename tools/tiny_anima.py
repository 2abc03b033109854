"""Tiny Anima checkpoints: DiT with its LLM adapter, Qwen3 text encoder, Qwen-Image VAE, in the published key layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.files.atomic import write_text_atomically
from library.files.safetensors_file import save_safetensors
from library.randomness import torch_generator
from tools.tiny_vae import vae_tensors

if TYPE_CHECKING:
    from torch import Tensor

T5_VOCABULARY = 32128  # rows of the T5 embedding in the published file
QWEN_VOCABULARY = 151936  # rows of the Qwen3 embedding: every id of the bundled tokenizer
LATENT_CHANNELS = 16
PATCH_VALUES = 2 * 2  # latent positions in one token
# Layers that write into the DiT's residual stream, and the size of what they write. The stream is normalised wherever it is
# read, so a small one changes no output, but lets the small steps of a usual LoRA learning rate move it within 200 steps.
STREAM_WRITERS = ("x_embedder.proj.1.weight", "_attn.output_proj.weight", "mlp.layer2.weight")
STREAM_SIZE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaSizes:
    """Widths and depths. ``width`` / ``heads`` must suit the 3-D RoPE: head_dim // 6 * 2 channels each for height and width."""

    width: int
    heads: int
    blocks: int
    modulation_rank: int
    context: int  # width of the text encoder, of the adapter and of the DiT's cross-attention keys
    context_heads: int
    adapter_blocks: int
    qwen_layers: int
    qwen_head_dim: int
    vae_width: int


SIZES = {
    "tiny": AnimaSizes(
        width=64, heads=2, blocks=2, modulation_rank=16, context=32, context_heads=2, adapter_blocks=2,
        qwen_layers=2, qwen_head_dim=16, vae_width=8,
    ),
    "bench": AnimaSizes(
        width=1024, heads=8, blocks=4, modulation_rank=256, context=256, context_heads=4, adapter_blocks=2,
        qwen_layers=4, qwen_head_dim=64, vae_width=32,
    ),
}  # fmt: skip

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def make_anima(
    out_dir: Path, *, size: str = "tiny", seed: int = 0, dtype: str = "bf16", qwen3_folder: bool = False
) -> dict[str, Path]:
    """Writes the three files and returns their paths under ``dit``, ``qwen3`` and ``vae`` (and ``qwen3_folder``).

    Raises OutputError when the folder cannot be written. Equal arguments give equal bytes.
    """
    sizes = SIZES[size]
    out_dir = Path(out_dir)
    paths = {
        "dit": out_dir / f"anima_{size}.safetensors",
        "qwen3": out_dir / f"qwen3_{size}.safetensors",
        "vae": out_dir / f"qwen_image_vae_{size}.safetensors",
    }
    qwen = qwen3_tensors(sizes, seed=seed)
    _save(paths["dit"], dit_tensors(sizes, seed=seed), dtype)
    _save(paths["qwen3"], qwen, dtype)
    _save(paths["vae"], vae_tensors(sizes.vae_width, seed=seed), dtype)
    if qwen3_folder:
        paths["qwen3_folder"] = out_dir / f"qwen3_{size}"
        _save(paths["qwen3_folder"] / "model.safetensors", qwen, dtype)
        write_text_atomically(paths["qwen3_folder"] / "config.json", json.dumps(qwen3_config(sizes, dtype), indent=2) + "\n")
    return paths


def _save(path: Path, tensors: dict[str, Tensor], dtype: str) -> None:
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    save_safetensors(path, {name: tensor.to(kind) for name, tensor in tensors.items()}, {"format": "pt"})


def dit_tensors(sizes: AnimaSizes, *, seed: int) -> dict[str, Tensor]:
    """The DiT with its adapter, float32, every key with the published ``net.`` prefix."""
    shapes = [*_trunk_shapes(sizes), *_adapter_shapes(sizes)]
    return {f"net.{name}": _random(f"net.{name}", shape, seed=seed) for name, shape in shapes}


def qwen3_tensors(sizes: AnimaSizes, *, seed: int) -> dict[str, Tensor]:
    """The text encoder, float32, keys as in a Qwen3ForCausalLM file with tied embeddings."""
    return {f"model.{name}": _random(f"model.{name}", shape, seed=seed) for name, shape in _qwen3_shapes(sizes)}


def _trunk_shapes(sizes: AnimaSizes) -> Shapes:
    width, rank = sizes.width, sizes.modulation_rank
    yield "x_embedder.proj.1.weight", (width, (LATENT_CHANNELS + 1) * PATCH_VALUES)  # + 1: the padding mask
    yield "t_embedder.1.linear_1.weight", (width, width)
    yield "t_embedder.1.linear_2.weight", (3 * width, width)
    yield "t_embedding_norm.weight", (width,)
    for index in range(sizes.blocks):
        block = f"blocks.{index}"
        yield from _attention_shapes(f"{block}.self_attn", width, width, sizes.heads, "output_proj")
        yield from _attention_shapes(f"{block}.cross_attn", width, sizes.context, sizes.heads, "output_proj")
        yield f"{block}.mlp.layer1.weight", (4 * width, width)
        yield f"{block}.mlp.layer2.weight", (width, 4 * width)
        for part in ("self_attn", "cross_attn", "mlp"):
            yield f"{block}.adaln_modulation_{part}.1.weight", (rank, width)
            yield f"{block}.adaln_modulation_{part}.2.weight", (3 * width, rank)
    yield "final_layer.adaln_modulation.1.weight", (rank, width)
    yield "final_layer.adaln_modulation.2.weight", (2 * width, rank)
    yield "final_layer.linear.weight", (LATENT_CHANNELS * PATCH_VALUES, width)


def _adapter_shapes(sizes: AnimaSizes) -> Shapes:
    width = sizes.context
    yield "llm_adapter.embed.weight", (T5_VOCABULARY, width)
    for index in range(sizes.adapter_blocks):
        block = f"llm_adapter.blocks.{index}"
        for part in ("self_attn", "cross_attn"):
            yield f"{block}.norm_{part}.weight", (width,)
            yield from _attention_shapes(f"{block}.{part}", width, width, sizes.context_heads, "o_proj")
        yield f"{block}.norm_mlp.weight", (width,)
        yield from _layer_shapes(f"{block}.mlp.0", width, 4 * width)
        yield from _layer_shapes(f"{block}.mlp.2", 4 * width, width)
    yield from _layer_shapes("llm_adapter.out_proj", width, width)
    yield "llm_adapter.norm.weight", (width,)


def _attention_shapes(prefix: str, width: int, key_width: int, heads: int, out_name: str) -> Shapes:
    yield f"{prefix}.q_proj.weight", (width, width)
    yield f"{prefix}.k_proj.weight", (width, key_width)
    yield f"{prefix}.v_proj.weight", (width, key_width)
    yield f"{prefix}.{out_name}.weight", (width, width)
    yield f"{prefix}.q_norm.weight", (width // heads,)
    yield f"{prefix}.k_norm.weight", (width // heads,)


def _layer_shapes(prefix: str, inputs: int, outputs: int) -> Shapes:
    yield f"{prefix}.weight", (outputs, inputs)
    yield f"{prefix}.bias", (outputs,)


def _qwen3_shapes(sizes: AnimaSizes) -> Shapes:
    width, head = sizes.context, sizes.qwen_head_dim
    heads, key_heads = _qwen3_heads(sizes)
    yield "embed_tokens.weight", (QWEN_VOCABULARY, width)
    for index in range(sizes.qwen_layers):
        layer = f"layers.{index}"
        yield f"{layer}.self_attn.q_proj.weight", (heads * head, width)
        yield f"{layer}.self_attn.k_proj.weight", (key_heads * head, width)
        yield f"{layer}.self_attn.v_proj.weight", (key_heads * head, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, heads * head)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.mlp.gate_proj.weight", (3 * width, width)
        yield f"{layer}.mlp.up_proj.weight", (3 * width, width)
        yield f"{layer}.mlp.down_proj.weight", (width, 3 * width)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "norm.weight", (width,)


def _qwen3_heads(sizes: AnimaSizes) -> tuple[int, int]:
    """(query heads, key heads): as in the published model, twice the width in query channels, half as many key heads."""
    heads = 2 * sizes.context // sizes.qwen_head_dim
    return heads, heads // 2


def qwen3_config(sizes: AnimaSizes, dtype: str = "bf16") -> dict:
    """``config.json`` of a Hugging Face folder for these sizes."""
    heads, key_heads = _qwen3_heads(sizes)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": sizes.context,
        "intermediate_size": 3 * sizes.context,
        "num_hidden_layers": sizes.qwen_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": sizes.qwen_head_dim,
        "vocab_size": QWEN_VOCABULARY,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }


def _random(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Weights that keep a signal's size: norms near 1, biases small, matrices with 1/sqrt(inputs) times a gain."""
    import torch

    noise = torch.randn(shape, generator=torch_generator("tiny model", seed, name))
    if name.endswith(".bias"):
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    if "embed.weight" in name or "embed_tokens" in name:
        return noise
    return noise * (_gain(name) / shape[1] ** 0.5)


def _gain(name: str) -> float:
    if name.endswith(STREAM_WRITERS):
        return STREAM_SIZE
    if "final_layer.linear" in name:
        return 0.7  # the prediction starts with errors that a LoRA can take back
    if "modulation" in name or "t_embedder.1.linear_2" in name:
        return 0.5
    return 1.0
