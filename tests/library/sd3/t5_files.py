"""Tiny T5 encoders as tensors under the names that files give them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.files.weights_source import Part, file_tensors
from library.sd3.t5 import T5Encoder, build_t5, load_t5_weights
from library.sd3.t5_layout import SHARED, T5Config, expected_shapes, t5_part, t5_pieces
from tests.library.sd.clip_files import MemorySource

TINY_T5 = T5Config(width=24, layers=3, heads=3, head_dim=6, mlp_width=40)


def t5_tensors(config: T5Config = TINY_T5, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the module's names, large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in expected_shapes(config).items()}
    for name in tensors:
        if "norm" in name:
            tensors[name] += 1
        if name.endswith("relative_attention_bias.weight"):
            tensors[name] *= 5
    return tensors


def t5_source(config: T5Config = TINY_T5, *, prefix: str = "", embedding: str = SHARED, seed: int = 0) -> MemorySource:
    tensors = file_tensors(t5_tensors(config, seed), t5_pieces(config, embedding=embedding))
    return MemorySource({prefix + name: tensor for name, tensor in tensors.items()})


def tiny_t5_part(config: T5Config = TINY_T5, *, seed: int = 0) -> Part[T5Config]:
    return t5_part(t5_source(config, seed=seed), prefix="")


def loaded_t5(config: T5Config = TINY_T5, *, fp8: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> T5Encoder:
    model = build_t5(config, fp8=fp8)
    load_t5_weights(model, tiny_t5_part(config, seed=seed), device="cpu", dtype=dtype)
    return model


def their_t5(model: T5Encoder) -> nn.Module:
    """transformers' T5EncoderModel with the same weights, and with the dropout of the published config."""
    from transformers import T5Config as Settings
    from transformers import T5EncoderModel

    own = model.config
    settings = Settings(
        vocab_size=own.vocabulary, d_model=own.width, d_kv=own.head_dim, d_ff=own.mlp_width, num_layers=own.layers,
        num_heads=own.heads, feed_forward_proj="gated-gelu", dropout_rate=0.1,
    )  # fmt: skip
    other = T5EncoderModel(settings)
    state = model.state_dict()
    other.load_state_dict({**state, SHARED: state["encoder.embed_tokens.weight"]})
    return other.eval()
