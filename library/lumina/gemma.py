"""Gemma 2 as Lumina Image 2.0 uses it (arXiv 2408.00118): transformers' Gemma2Model without its last layer and final norm.

B captions · N tokens · C width of the states
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.lumina.gemma_layout import GemmaConfig

LONGEST = 8192  # tokens, as published; every other layer has a window of 4096, which is as many as the options allow


def build_gemma(config: GemmaConfig) -> nn.Module:
    """transformers' Gemma2Model of the layers that are used, with weights on the meta device, and real tables.

    Its attention is the explicit one: of those that every transformers from 4.51 on has, the others drop the soft cap of the
    logits.
    """
    # the module itself, not the package: the package's lazy lookup scans every model there is
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model, Gemma2RotaryEmbedding

    arguments: dict[str, Any] = dict(
        hidden_size=config.width,
        num_hidden_layers=config.used_blocks,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp_hidden,
        vocab_size=config.vocabulary,
        query_pre_attn_scalar=config.query_scalar,
        attn_logit_softcapping=config.softcap,
        rope_theta=config.rope_theta,  # transformers 5 moves it into rope_parameters by itself
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=LONGEST,
        sliding_window=LONGEST,
        attn_implementation="eager",
    )
    settings = Gemma2Config(**arguments)
    with torch.device("meta"):
        model: Any = Gemma2Model(settings)
    model.norm = nn.Identity()
    model.rotary_emb = Gemma2RotaryEmbedding(settings)
    scale = getattr(model.embed_tokens, "embed_scale", None)  # newer versions keep sqrt(C) in a buffer
    if isinstance(scale, Tensor):
        model.embed_tokens.embed_scale = torch.tensor(config.width**0.5)
    return model


def run_gemma(model: Any, ids: Tensor) -> Tensor:
    """ids (B, N) int64, padded on the right -> states (B, N, C) that the last layer would get; those of paddings mean nothing.

    Attention is causal, so tokens never see the padding behind them and no mask of theirs is needed.
    """
    mask = causal_mask(ids.shape[1], dtype=model.embed_tokens.weight.dtype, device=ids.device)
    return model(input_ids=ids, use_cache=False, **_masks(model, mask)).last_hidden_state


def causal_mask(tokens: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 1, N, N), to be added to logits: 0 up to the diagonal, the lowest number behind it."""
    lowest = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype, device=device)
    return lowest.triu(diagonal=1)[None, None]


def _masks(model: Any, mask: Tensor) -> dict[str, Any]:
    """From 4.53 on transformers takes ready masks by kind of layer; before, one of four axes for all, and waits for the device to
    learn how many tokens came before, unless it is told."""
    kinds = getattr(model.config, "layer_types", None)
    return {"attention_mask": dict.fromkeys(kinds, mask)} if kinds else {"attention_mask": mask, "last_cache_position": 0}
