"""T5 v1.1's encoder (arXiv 1910.10683, 2002.05202): token ids -> states, the third text encoder of SD3.

B rows of tokens · N tokens of a row · D width · H heads · K head width · M width of the feed forward layer
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.files.weights_source import Part, module_tensors
from library.nn.checkpointing import LayerCheckpoints
from library.nn.fp8 import compute_dtype, use_fp8
from library.nn.loading import load_into
from library.nn.norms import at_least_fp32, rms_norm
from library.nn.precision import OwnPrecision
from library.sd3.t5_layout import T5Config

FP8_LAYERS = r"encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(wi_[01]|wo))"


class T5Encoder(LayerCheckpoints, OwnPrecision, nn.Module):
    """transformers' modules with a forward of its own: layers are ``encoder.block.0.layer.0.SelfAttention.q`` and so on; these
    names become the names in LoRA files.

    The sums between the layers reach tens of thousands, which float16 cannot hold and bfloat16 not exactly: they are float32
    whatever the dtype of the weights. Nothing is dropped at random, in training mode neither.
    """

    def __init__(self, encoder: nn.Module, config: T5Config):
        super().__init__()
        self.encoder: Any = encoder
        self.config = config

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, N) int64; mask (B, N) bool, False: no token looks there -> (B, N, D) in the dtype of the model."""
        with self.precision(ids):
            x = at_least_fp32(self.encoder.embed_tokens(ids))
            bias = self.position_bias(ids.shape[1], ids.device)  # (1, H, N, N)
            if mask is not None:
                bias = bias.masked_fill(~mask[:, None, None], -torch.inf)  # (B, H, N, N)
            for block in self.encoder.block:
                x = self.checkpointed(run_block, block, x, bias)
            return normed(self.encoder.final_layer_norm, x, self.config.norm_eps)

    def position_bias(self, tokens: int, device: torch.device) -> Tensor:
        """(1, H, N, N): what the distance of two tokens adds to the product of query and key, in all blocks the same."""
        return self.encoder.block[0].layer[0].SelfAttention.compute_bias(tokens, tokens, device=device)


def run_block(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """One of transformers' T5Blocks. x (B, N, D) float32, bias (1 or B, H, N, N) -> (B, N, D)"""
    first, second = block.layer
    x = x + attention(first.SelfAttention, normed(first.layer_norm, x, first.layer_norm.variance_epsilon), bias)
    return x + feed_forward(second.DenseReluDense, normed(second.layer_norm, x, second.layer_norm.variance_epsilon))


def attention(layer: Any, h: Tensor, bias: Tensor) -> Tensor:
    """h (B, N, D) -> (B, N, D). Products of queries and keys are not divided: the weights of T5 see to that."""
    q, k, v = (
        projection(h).unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)  # (B, H, N, K)
        for projection in (layer.q, layer.k, layer.v)
    )
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
    return layer.o(h.transpose(1, 2).flatten(2))


def feed_forward(layer: Any, h: Tensor) -> Tensor:
    """h (B, N, D) -> (B, N, D): GELU in its tanh form, gated.

    Both the product of the two halves (M wide) and the result can be too large for float16; each token's is divided by its
    largest value before the last layer, and the result multiplied by it in float32.
    """
    gate, value = F.gelu(layer.wi_0(h), approximate="tanh"), layer.wi_1(h)  # (B, N, M)
    if compute_dtype(value) != torch.float16:
        return layer.wo(gate * value)
    wide = gate.float() * value.float()
    size = wide.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1.0)  # (B, N, 1)
    return layer.wo((wide / size).to(torch.float16)).float() * size


def normed(norm: Any, x: Tensor, eps: float) -> Tensor:
    """x (B, N, D) float32 -> (B, N, D) in the dtype of the norm's weight, which is the model's."""
    return rms_norm(x, norm.weight.to(x.dtype), eps).to(norm.weight.dtype)


def build_t5(config: T5Config, *, fp8: bool = False) -> T5Encoder:
    """The encoder on the meta device, in evaluation mode. ``fp8``: its layers take their weights in 8 bits."""
    # the modules themselves, not the package: the package's lazy lookup scans every model there is
    from transformers.models.t5.configuration_t5 import T5Config as Settings
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    settings: dict[str, Any] = dict(
        vocab_size=config.vocabulary,
        d_model=config.width,
        d_kv=config.head_dim,
        d_ff=config.mlp_width,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.norm_eps,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        model = T5Encoder(T5EncoderModel(Settings(**settings)).encoder, config)
    if fp8:
        use_fp8(model, FP8_LAYERS)
    return model.eval()


def load_t5_weights(model: T5Encoder, part: Part[T5Config], *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Streams the weights of ``part`` into a model built from its config, tensor by tensor, frozen."""
    load_into(model, module_tensors(part.source, part.pieces), device=device, dtype=dtype)
