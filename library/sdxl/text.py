"""SDXL's text side: captions -> states of two CLIP text encoders, joined on channels, and a pooled vector of the second.

B captions · n rows of 77 tokens for each · N = 75 n + 2 · D1, D2 widths of CLIP-L and CLIP-G (768, 1280) · P pooled (1280)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.files.weights_source import Part
from library.nn.transfer import sent
from library.sd.clip import ClipTextModel, build_clip
from library.sd.clip_layout import ClipConfig
from library.sd.clip_tokenizer import CLIP_L, END_ID, OPEN_CLIP_G, PIECE, ROW, ClipTokenizer, load_tokenizers
from library.sd.text import by_text, joined, sent_ids, unique_rows, weighed


@dataclass(frozen=True, slots=True, eq=False)
class SdxlConditioning:
    """Text conditioning of B captions, all of the same length."""

    states: Tensor  # (B, N, D1 + D2)
    pooled: Tensor  # (B, P)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SdxlConditioning:
        return SdxlConditioning(
            self.states.to(device, non_blocking=non_blocking), self.pooled.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> SdxlConditioning:
        return SdxlConditioning(self.states.pin_memory(), self.pooled.pin_memory())

    def split(self) -> list[SdxlConditioning]:
        return [SdxlConditioning(s[None], p[None]) for s, p in zip(self.states, self.pooled, strict=True)]

    def cache_tensors(self) -> dict[str, Tensor]:
        """Of ONE caption: ``states`` (N, D1 + D2) and ``pooled`` (P,), in their dtype."""
        (states,), (pooled,) = self.states, self.pooled
        return {"states": states, "pooled": pooled}

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> SdxlConditioning:
        return cls(tensors["states"], tensors["pooled"])

    @classmethod
    def stack(cls, parts: Sequence[SdxlConditioning]) -> SdxlConditioning:
        return cls(torch.cat([part.states for part in parts]), torch.cat([part.pooled for part in parts]))


class SdxlTextEncoder(nn.Module):
    """CLIP-L and CLIP-G with their tokenizers. Both give the states before their last layer, without the final norm; --clip_skip
    has no say here."""

    def __init__(
        self,
        clip_l: ClipTextModel,
        clip_g: ClipTextModel,
        tokenizers: tuple[ClipTokenizer, ClipTokenizer],
        *,
        max_token_length: int | None = None,
        weighted_captions: bool = False,
    ):
        super().__init__()
        self.clip_l, self.clip_g = clip_l, clip_g
        self.tokenizers = tokenizers
        self.tokens = max_token_length or PIECE
        self.weighted_captions = weighted_captions

    def encode(self, captions: Sequence[str], device: torch.device | str | None = None) -> SdxlConditioning:
        """On ``device`` (default: the models'), in the models' dtype. The caller sets gradient mode."""
        return self._encode(captions, device, weighted=self.weighted_captions)

    def encode_prompts(
        self, texts: Sequence[str], device: torch.device | str | None = None, *, second: Sequence[str] | None = None
    ) -> SdxlConditioning:
        """As captions are encoded, but weights are always read. ``second``: other texts for CLIP-G."""
        return self._encode(texts, device, weighted=True, second=second)

    def _encode(
        self,
        captions: Sequence[str],
        device: torch.device | str | None,
        *,
        weighted: bool,
        second: Sequence[str] | None = None,
    ) -> SdxlConditioning:
        texts_l, texts_g = (
            [tokenizer.rows(text, tokens=self.tokens, weighted=weighted) for text in texts]
            for tokenizer, texts in zip(self.tokenizers, (captions, captions if second is None else second), strict=True)
        )
        ids, places = unique_rows(texts_l)
        states_l = by_text(self._penultimate(self.clip_l, ids), places, len(captions))  # (B, n, 77, D1)
        ids, places = unique_rows(texts_g)
        states_g = by_text(self._penultimate(self.clip_g, ids), places, len(captions))  # (B, n, 77, D2)
        pooled = self._pooled(states_g[:, 0], [end_of(text.ids[0]) for text in texts_g])
        states = torch.cat([joined(weighed(states_l, texts_l)), joined(weighed(states_g, texts_g))], dim=-1)
        found = SdxlConditioning(states, pooled)
        return found if device is None else found.to(device)

    @staticmethod
    def _penultimate(model: ClipTextModel, ids: list[list[int]]) -> Tensor:
        return model.run(model.embed(sent_ids(ids, model)), 0, model.config.layers - 1)

    def _pooled(self, x: Tensor, ends: list[int]) -> Tensor:
        """x (B, 77, D2), the states of each caption's first row before the last layer -> (B, P). The first end mark counts."""
        layers = self.clip_g.config.layers
        return self.clip_g.pooled(self.clip_g.run(x, layers - 1, layers), sent(torch.tensor(ends), x.device))


def end_of(row: list[int]) -> int:
    """The place of the first end mark, else of the last token: a row that is full and ends in a "!" that is the padding's id, as
    in "wow!(", has no end mark."""
    return row.index(END_ID) if END_ID in row else ROW - 1


def build_text_encoder(
    parts: Sequence[Part[ClipConfig]],
    *,
    max_token_length: int | None = None,
    weighted_captions: bool = False,
    fp8: bool = False,
) -> SdxlTextEncoder:
    """The text encoders of ``parts`` (CLIP-L, CLIP-G) on the meta device, and their tokenizers. ``load_text_encoder`` of
    library/sd/text.py loads them."""
    part_l, part_g = parts
    if part_g.config.projection is None:
        raise CheckpointError(f"{part_g.source.path}: the second text encoder has no text_projection, which SDXL needs")
    tokenizer_l, tokenizer_g = load_tokenizers(CLIP_L, OPEN_CLIP_G)
    return SdxlTextEncoder(
        build_clip(part_l.config, fp8=fp8),
        build_clip(part_g.config, fp8=fp8),
        (tokenizer_l, tokenizer_g),
        max_token_length=max_token_length,
        weighted_captions=weighted_captions,
    ).eval()
