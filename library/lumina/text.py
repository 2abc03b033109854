"""Lumina's text side: captions -> states of Gemma 2.

B captions · T tokens, padded on the right · C width of the states (2304)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.files.weights_source import Part, module_tensors
from library.lumina.gemma import build_gemma, run_gemma
from library.lumina.gemma_layout import GemmaConfig
from library.lumina.system_prompt import with_system_prompt
from library.lumina.tokenizer import PAD_ID, GemmaTokenizer, GemmaTokenizerFile
from library.nn.decoder_layers import DECODER_FP8_LAYERS
from library.nn.fp8 import use_fp8
from library.nn.loading import load_into
from library.nn.transfer import sent
from library.text.tokenizer_files import padded


@dataclass(frozen=True, slots=True, eq=False)
class LuminaConditioning:
    """Text conditioning of B captions, padded on the right to the longest. An empty caption has one row, that of <bos>."""

    states: Tensor  # (B, T, C), zeros at the padding
    lengths: tuple[int, ...] = field(kw_only=True)  # valid rows of each, at least 1; on the host, so that no step waits for them

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LuminaConditioning:
        return LuminaConditioning(self.states.to(device, non_blocking=non_blocking), lengths=self.lengths)

    def pin_memory(self) -> LuminaConditioning:
        return LuminaConditioning(self.states.pin_memory(), lengths=self.lengths)

    def split(self) -> list[LuminaConditioning]:
        """One per caption, without the padding that its batch needed."""
        return [LuminaConditioning(self.states[i : i + 1, :n], lengths=(n,)) for i, n in enumerate(self.lengths)]

    def cache_tensors(self) -> dict[str, Tensor]:
        """``states`` (n, C) of ONE caption in its dtype, valid rows only."""
        (length,) = self.lengths
        return {"states": self.states[0, :length]}

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> LuminaConditioning:
        return cls(tensors["states"], lengths=tuple(lengths["states"]))

    @classmethod
    def stack(cls, parts: Sequence[LuminaConditioning]) -> LuminaConditioning:
        longest = max(part.states.shape[1] for part in parts)
        padded = [nn.functional.pad(p.states, (0, 0, 0, longest - p.states.shape[1])) for p in parts]
        return cls(torch.cat(padded), lengths=tuple(n for part in parts for n in part.lengths))


class LuminaTextEncoder(nn.Module):
    """Gemma 2 with its tokenizer. ``model`` is frozen; a LoRA on its layers gets gradients."""

    def __init__(self, model: nn.Module, tokenizer: GemmaTokenizer, *, width: int, system_prompt: str = ""):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.width = width  # C
        self.system_prompt = system_prompt

    def encode(self, captions: Sequence[str], device: torch.device | str | None = None) -> LuminaConditioning:
        """Captions for training: each that is not empty gets the system prompt before it."""
        return self.encode_prompts([with_system_prompt(caption, self.system_prompt) for caption in captions], device)

    def encode_prompts(self, texts: Sequence[str], device: torch.device | str | None = None) -> LuminaConditioning:
        """Texts as they are -> states before the last layer, on ``device`` (default: the model's), in the model's dtype.

        A text's result does not depend on the others in its batch, except for rounding. The caller sets gradient mode.
        """
        own_device = next(self.model.parameters()).device
        rows = [self.tokenizer.ids(text) for text in texts]
        lengths = tuple(map(len, rows))
        ids, mask = (torch.tensor(values) for values in padded(rows, PAD_ID))  # (B, T)
        states = run_gemma(self.model, sent(ids, own_device))
        if min(lengths) < max(lengths):
            states = states.masked_fill(sent(~mask, own_device)[:, :, None], 0)
        return LuminaConditioning(states if device is None else states.to(device), lengths=lengths)


def build_text_encoder(
    part: Part[GemmaConfig], tokenizer: GemmaTokenizer | GemmaTokenizerFile, *, system_prompt: str = "", fp8: bool = False
) -> LuminaTextEncoder:
    """The encoder without weights, on the meta device. Raises CheckpointError for a tokenizer that is not this encoder's.

    ``fp8``: the weights of its layers are going to be kept in 8 bits, those of the embedding and of the norms are not.
    """
    if isinstance(tokenizer, GemmaTokenizerFile):
        tokenizer = tokenizer.load()
    tokenizer.check_vocabulary(part.config.vocabulary)
    model = build_gemma(part.config)
    if fp8:
        use_fp8(model, DECODER_FP8_LAYERS)
    return LuminaTextEncoder(model, tokenizer, width=part.config.width, system_prompt=system_prompt).eval()


def load_text_encoder(
    encoder: LuminaTextEncoder,
    part: Part[GemmaConfig],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Streams the weights of ``part`` into an encoder built from it, tensor by tensor, frozen, in ``dtype`` on ``device``."""
    load_into(encoder.model, module_tensors(part.source, part.pieces), device=device, dtype=dtype)


def text_models(encoder: LuminaTextEncoder) -> list[Any]:
    """The encoder's models in the order of --text_encoder_lr."""
    return [encoder.model]
