"""CLIP's text transformer, arXiv 2103.00020: token ids -> states, the text encoder of Stable Diffusion 1, 2 and SDXL.

B rows of tokens · N tokens of a row (77) · D width · H heads
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.files.weights_source import Part, module_tensors
from library.nn.checkpointing import LayerCheckpoints
from library.nn.fp8 import use_fp8
from library.nn.loading import load_into
from library.nn.precision import OwnPrecision
from library.sd.clip_layout import ClipConfig

FP8_LAYERS = r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"  # not the embeddings
NORM_EPS = 1e-5


class ClipTextModel(LayerCheckpoints, OwnPrecision, nn.Module):
    """transformers' modules under one name whatever its version, so that layers are
    ``text_model.encoder.layers.0.self_attn.q_proj`` and so on; these names become the names in LoRA files.

    Callers say which layers they need: ``model.run(model.embed(ids), 0, 11)``. Attention is causal; only SD3 can have it see no
    padding besides.
    """

    def __init__(self, text_model: nn.Module, config: ClipConfig):
        super().__init__()
        self.text_model = text_model
        self.config = config
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False, device="meta")

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, N) int64 -> x (B, N, D)"""
        with self.precision(ids):
            return self._inner.embeddings(input_ids=ids)

    def run(self, x: Tensor, first: int, end: int, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), which layer number ``first`` takes, through the layers before ``end`` -> (B, N, D), not normed.

        ``mask``: of ``causal_mask``; None: each token sees all before it.
        """
        with self.precision(x):
            for layer in self._inner.encoder.layers[first:end]:
                x = self.checkpointed(run_layer, layer, x, mask)
            return x

    def normed(self, x: Tensor) -> Tensor:
        with self.precision(x):
            return self._inner.final_layer_norm(x)

    def pooled(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (B, N, D) of the last layer, ends (B,) int64 places of the end marks -> (B, P), projected if the model does that"""
        at_end = x[torch.arange(len(x), device=x.device), ends]  # (B, D)
        with self.precision(x):
            found = self.normed(at_end)
            return found if self.config.projection is None else self.text_projection(found)

    @property
    def _inner(self) -> Any:
        return self.text_model


def run_layer(layer: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One of transformers' CLIPEncoderLayers, whose own forward differs from version to version. x (B, N, D) -> (B, N, D)"""
    attention = layer.self_attn
    h = layer.layer_norm1(x)
    q, k, v = (
        projection(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, H, N, D / H)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # scale 1 / sqrt(D / H)
    x = x + attention.out_proj(h.transpose(1, 2).flatten(2))  # (B, N, D)
    return x + layer.mlp(layer.layer_norm2(x))


def causal_mask(valid: Tensor) -> Tensor:
    """valid (B, N) bool, True at tokens that others may see -> (B, 1, N, N) bool: which token sees which."""
    tokens = valid.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device).tril()
    return before & valid[:, None, None]


def build_clip(config: ClipConfig, *, fp8: bool = False) -> ClipTextModel:
    """The encoder on the meta device, in evaluation mode. ``fp8``: its layers take their weights in 8 bits."""
    # the modules themselves, not the package: the package's lazy lookup scans every model there is
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    sizes: dict[str, Any] = dict(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        layer_norm_eps=NORM_EPS,
        attn_implementation="eager",  # only for the class: other ways had classes of their own in transformers 4.51
    )
    with torch.device("meta"):
        built = CLIPTextModel(CLIPTextConfig(**sizes))
    inner = getattr(built, "text_model", built)  # transformers 5 has no such level
    inner.embeddings.position_ids = torch.arange(config.positions).expand(1, -1)  # not in files
    model = ClipTextModel(inner, config)
    if fp8:
        use_fp8(model, FP8_LAYERS)
    return model.eval()


def load_clip(model: ClipTextModel, part: Part[ClipConfig], *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Streams the weights of ``part`` into a model built from its config, tensor by tensor, frozen."""
    load_into(model, module_tensors(part.source, part.pieces), device=device, dtype=dtype)
