"""Anima's text side: captions -> Qwen3 states and T5 ids, the two inputs of the LLM adapter.

B captions · N Qwen3 tokens · M T5 tokens · D width of the Qwen3 states (1024)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.anima.text_layout import TextEncoderConfig, TextEncoderLayout
from library.anima.tokenizers import AnimaTokenizers, TokenizerFiles
from library.files.safetensors_file import read_tensors
from library.nn.decoder_layers import DECODER_FP8_LAYERS
from library.nn.fp8 import use_fp8
from library.nn.loading import load_into
from library.nn.transfer import sent
from library.text.tokenizer_files import padded

T5_END_ID = 1  # the id of </s> in every T5 vocabulary, all that an empty caption has


@dataclass(frozen=True, slots=True, eq=False)
class AnimaConditioning:
    """Text conditioning of B captions, padded on the right to the longest. No axis is ever empty: N, M >= 1.

    The LLM adapter masks both paddings, and its result is padded to the DiT's 512 rows later, so the padded length here
    changes nothing. An empty caption has no valid Qwen3 row.
    """

    prompt_embeds: Tensor  # (B, N, D) Qwen3 states, zeros where masked
    qwen_mask: Tensor  # (B, N) bool, True = a token
    t5_ids: Tensor  # (B, M) int64, 0 where masked
    t5_mask: Tensor  # (B, M) bool
    lengths: tuple[tuple[int, int], ...] | None = field(default=None, kw_only=True)  # valid (Qwen3, T5) rows; None: see the masks

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AnimaConditioning:
        """The encoding of '': no Qwen3 token, a lone ``</s>`` for T5."""
        nothing = torch.zeros(1, 1, width, dtype=dtype, device=device)
        end = torch.full((1, 1), T5_END_ID, device=device)
        masked = torch.zeros(1, 1, dtype=torch.bool, device=device)
        return cls(nothing, masked, end, torch.ones_like(end, dtype=torch.bool), lengths=((0, 1),))

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.prompt_embeds, self.qwen_mask, self.t5_ids, self.t5_mask

    @property
    def adapter_inputs(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The arguments of ``AnimaDenoiser.encode_context``, without a mask where the host knows that it masks nothing."""
        if self.lengths is None:
            return self._tensors
        qwen_mask = None if min(n for n, _ in self.lengths) == self.qwen_mask.shape[1] else self.qwen_mask
        t5_mask = None if min(m for _, m in self.lengths) == self.t5_mask.shape[1] else self.t5_mask
        return self.prompt_embeds, qwen_mask, self.t5_ids, t5_mask

    @property
    def used_rows(self) -> int:
        """From this row on the DiT's context is zero for every caption."""
        return self.t5_ids.shape[1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AnimaConditioning:
        return AnimaConditioning(
            *(tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors), lengths=self.lengths
        )

    def pin_memory(self) -> AnimaConditioning:
        return AnimaConditioning(*(tensor.pin_memory() for tensor in self._tensors), lengths=self.lengths)

    def split(self) -> list[AnimaConditioning]:
        """One per caption, without the padding that its batch needed."""
        lengths = self._lengths_now()
        return [
            AnimaConditioning(
                self.prompt_embeds[i : i + 1, : max(1, n)], self.qwen_mask[i : i + 1, : max(1, n)],
                self.t5_ids[i : i + 1, : max(1, m)], self.t5_mask[i : i + 1, : max(1, m)], lengths=((n, m),),
            )
            for i, (n, m) in enumerate(lengths)
        ]  # fmt: skip

    def _lengths_now(self) -> tuple[tuple[int, int], ...]:
        if self.lengths is not None:
            return self.lengths
        counts = torch.stack([self.qwen_mask.sum(1), self.t5_mask.sum(1)], dim=1).tolist()  # one wait for the device
        return tuple((n, m) for n, m in counts)

    def cache_tensors(self) -> dict[str, Tensor]:
        """``prompt_embeds`` (n, D) in its dtype and ``t5_ids`` (m,) int32 of ONE caption, valid rows only; n = 0 for ''."""
        if len(self.t5_ids) != 1:
            raise ValueError(f"a cache entry holds one caption, not {len(self.t5_ids)}: split() first")
        return {
            "prompt_embeds": self.prompt_embeds[0][self.qwen_mask[0]],
            "t5_ids": self.t5_ids[0][self.t5_mask[0]].to(torch.int32),
        }

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> AnimaConditioning:
        embeds, ids = tensors["prompt_embeds"], tensors["t5_ids"].to(torch.int64)  # (B, N, D), (B, M)
        if embeds.shape[1] == 0:  # only empty captions
            embeds = embeds.new_zeros(len(embeds), 1, embeds.shape[2])
        qwen_mask = _first(lengths["prompt_embeds"], embeds.shape[1])
        pairs = tuple(zip(lengths["prompt_embeds"], lengths["t5_ids"], strict=True))
        return cls(embeds, qwen_mask, ids, _first(lengths["t5_ids"], ids.shape[1]), lengths=pairs)

    @classmethod
    def stack(cls, parts: Sequence[AnimaConditioning]) -> AnimaConditioning:
        tensors = (_joined([part._tensors[place] for part in parts]) for place in range(4))
        known = [part.lengths for part in parts if part.lengths is not None]
        pairs = tuple(pair for lengths in known for pair in lengths)
        return cls(*tensors, lengths=pairs if len(known) == len(parts) else None)


def _first(lengths: Sequence[int], longest: int) -> Tensor:
    """(B, longest) bool: True at the first ``lengths`` places of each row."""
    # numpy, because this is done for every batch and torch takes five times as long for something so small
    return torch.from_numpy(np.arange(longest) < np.array(lengths)[:, None])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """(B_i, L_i, ...) each -> (sum of B_i, longest L, ...), zeros (False) at the padding."""
    longest = max(tensor.shape[1] for tensor in tensors)
    if all(tensor.shape[1] == longest for tensor in tensors):
        return torch.cat(list(tensors))
    out = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), longest, *tensors[0].shape[2:])
    start = 0
    for tensor in tensors:
        out[start : start + len(tensor), : tensor.shape[1]] = tensor
        start += len(tensor)
    return out


class AnimaTextEncoder(nn.Module):
    """Qwen3 with its tokenizer, and the T5 tokenizer. ``model`` is transformers' Qwen3Model without its head, frozen; a LoRA on
    its layers gets gradients."""

    def __init__(self, model: nn.Module, tokenizers: AnimaTokenizers, width: int):
        super().__init__()
        self.model = model
        self.tokenizers = tokenizers
        self.width = width  # D

    def encode(self, captions: Sequence[str], device: torch.device | str | None = None) -> AnimaConditioning:
        """States of the last layer after the final norm, on ``device`` (default: the model's), in the model's dtype.

        A caption's result does not depend on the others in its batch, except for rounding. The caller sets gradient mode.
        """
        own_device = next(self.model.parameters()).device
        tokens = [self.tokenizers.ids(caption) for caption in captions]
        qwen_ids, qwen_mask = (torch.tensor(rows) for rows in padded([t.qwen for t in tokens], self.tokenizers.qwen_pad_id))
        t5_ids, t5_mask = (torch.tensor(rows) for rows in padded([t.t5 for t in tokens], pad_id=0))
        embeds = self.states(sent(qwen_ids, own_device), sent(qwen_mask, own_device), nothing=not bool(qwen_mask.any()))
        place = own_device if device is None else torch.device(device)
        lengths = tuple((len(t.qwen), len(t.t5)) for t in tokens)
        return AnimaConditioning(embeds.to(place), *(sent(t, place) for t in (qwen_mask, t5_ids, t5_mask)), lengths=lengths)

    def states(self, ids: Tensor, mask: Tensor, *, nothing: bool = False) -> Tensor:
        """ids (B, N) int64, mask (B, N) with True at tokens, padded on the right -> (B, N, D), zeros where masked.

        ``nothing``: no token in the whole batch, so the model need not run. Attention is causal, so tokens never see the padding
        behind them and no mask is passed: that allows the fastest attention kernel. Nothing waits for the device.
        """
        if nothing:
            parameter = next(self.model.parameters())
            return parameter.new_zeros(*ids.shape, self.width)
        states = self.model(input_ids=ids, attention_mask=no_masks(self.model), use_cache=False).last_hidden_state
        return states.masked_fill(~mask.bool()[:, :, None], 0)


def no_masks(model: Any) -> dict[str, None] | None:
    """The ``attention_mask`` of a Qwen3Model whose attention is causal and no more.

    Given None, transformers 4.53 and later make the masks; to see whether there is need of one they wait for the device.
    """
    kinds = getattr(model.config, "layer_types", None)  # which those versions have
    return dict.fromkeys(kinds) if kinds else None


def build_text_encoder(
    layout: TextEncoderLayout, tokenizers: AnimaTokenizers | TokenizerFiles, *, fp8: bool = False
) -> AnimaTextEncoder:
    """The encoder without weights, on the meta device. Raises CheckpointError for a tokenizer that is not this encoder's.

    ``fp8``: the weights of its layers are going to be kept in 8 bits, those of the embedding and of the norms are not.
    """
    if isinstance(tokenizers, TokenizerFiles):
        tokenizers = tokenizers.load()
    tokenizers.check_vocabulary(layout.config.vocabulary)
    model = build_qwen3(layout.config)
    if fp8:
        use_fp8(model, DECODER_FP8_LAYERS)
    return AnimaTextEncoder(model, tokenizers, layout.config.width).eval()


def load_text_encoder(
    encoder: AnimaTextEncoder,
    layout: TextEncoderLayout,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Streams the weights of ``layout`` into an encoder built from it, tensor by tensor, frozen, in ``dtype`` on ``device``."""
    tensors = (
        (source.names[key], tensor) for source in layout.sources for key, tensor in read_tensors(source.header, source.names)
    )
    load_into(encoder.model, tensors, device=device, dtype=dtype)


def build_qwen3(config: TextEncoderConfig) -> nn.Module:
    """transformers' Qwen3Model with weights on the meta device, and real rotary tables."""
    # the module itself, not the package: the package's lazy lookup scans every model there is
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RotaryEmbedding

    arguments: dict[str, Any] = dict(
        hidden_size=config.width,
        num_hidden_layers=config.blocks,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp_hidden,
        vocab_size=config.vocabulary,
        rope_theta=config.rope_theta,  # transformers 5 moves it into rope_parameters by itself
        rms_norm_eps=config.norm_eps,
        sliding_window=None,  # there is none; transformers 4.51 warns of its default
        attn_implementation="sdpa",
    )
    settings = Qwen3Config(**arguments)
    with torch.device("meta"):
        model = Qwen3Model(settings)
    model.rotary_emb = Qwen3RotaryEmbedding(settings)
    return model
