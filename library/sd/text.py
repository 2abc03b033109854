"""The text side of Stable Diffusion 1 and 2: captions -> states of a CLIP text encoder.

B captions · n rows of 77 tokens for each · N tokens that the U-Net sees · D width of the states
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from library.errors import OptionError
from library.files.weights_source import Part
from library.nn.transfer import sent
from library.sd.clip import ClipTextModel, build_clip, load_clip
from library.sd.clip_layout import ClipConfig, clip_skip_problem
from library.sd.clip_tokenizer import (
    CLIP_L,
    OPEN_CLIP_H,
    PIECE,
    ROW,
    ClipTokenizer,
    TokenRows,
    load_tokenizers,
    stacked,
)


@dataclass(frozen=True, slots=True, eq=False)
class SdConditioning:
    """Text conditioning of B captions. All captions of a run have the same length: 77 rows, or 75 n + 2."""

    states: Tensor  # (B, N, D)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SdConditioning:
        return SdConditioning(self.states.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SdConditioning:
        return SdConditioning(self.states.pin_memory())

    def split(self) -> list[SdConditioning]:
        return [SdConditioning(states[None]) for states in self.states]

    def cache_tensors(self) -> dict[str, Tensor]:
        """``states`` (N, D) of ONE caption, in its dtype."""
        (states,) = self.states
        return {"states": states}

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> SdConditioning:
        return cls(tensors["states"])

    @classmethod
    def stack(cls, parts: Sequence[SdConditioning]) -> SdConditioning:
        return cls(torch.cat([part.states for part in parts]))


@dataclass(frozen=True, slots=True, eq=False)
class SdPrompts:
    """B prompts for pictures, before it is known how long they must be: a prompt and its negative are made equally long, by rows
    of padding (see ``equally_long``)."""

    states: Tensor  # (B, n, 77, D) of each row, as the encoder gave them; padded with ``padding``
    weights: Tensor  # (B, n, 77) float32
    padding: Tensor  # (B, 77, D) states of a row without text
    rows: tuple[int, ...] = field(kw_only=True)  # that each prompt needs, at least 1

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.states, self.weights, self.padding

    def conditioning(self, rows: int | None = None) -> SdConditioning:
        """Weighed, in ``rows`` rows (default: as many as the longest needs), each with its own marks: N = 77 * rows.

        Weights shift the mean of the states; it is put back to what it was, as Stable Diffusion's previews always did.
        """
        states, weights = self._extended(max(self.rows) if rows is None else rows)
        weighed = states.float() * weights[..., None]  # (B, n, 77, D)
        before, after = (s.float().mean(dim=(1, 2, 3), keepdim=True) for s in (states, weighed))
        is_weighed = (weights != 1).any(dim=2).any(dim=1)[:, None, None, None]
        weighed = torch.where(is_weighed, weighed * (before / after), weighed)
        return SdConditioning(weighed.to(states.dtype).flatten(1, 2))

    def _extended(self, rows: int) -> tuple[Tensor, Tensor]:
        """The first ``rows`` rows of states (B, rows, 77, D) and weights (B, rows, 77), with padding where there are fewer."""
        states, weights = self.states[:, :rows], self.weights[:, :rows]
        if missing := rows - states.shape[1]:
            states = torch.cat([states, self.padding[:, None].expand(-1, missing, -1, -1)], dim=1)
            weights = torch.cat([weights, weights.new_ones(len(weights), missing, ROW)], dim=1)
        return states, weights

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SdPrompts:
        return SdPrompts(*(tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors), rows=self.rows)

    def pin_memory(self) -> SdPrompts:
        return SdPrompts(*(tensor.pin_memory() for tensor in self._tensors), rows=self.rows)

    def split(self) -> list[SdPrompts]:
        return [
            SdPrompts(self.states[i : i + 1, :n], self.weights[i : i + 1, :n], self.padding[i : i + 1], rows=(n,))
            for i, n in enumerate(self.rows)
        ]

    def cache_tensors(self) -> dict[str, Tensor]:
        """Of ONE prompt: ``states`` (n, 77, D), ``weights`` (n, 77), ``padding`` (77, D)."""
        (rows,) = self.rows
        return {"states": self.states[0, :rows], "weights": self.weights[0, :rows], "padding": self.padding[0]}

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> SdPrompts:
        parts = zip(tensors["states"], tensors["weights"], tensors["padding"], lengths["states"], strict=True)
        return cls.stack([cls(s[None, :n], w[None, :n], p[None], rows=(n,)) for s, w, p, n in parts])

    @classmethod
    def stack(cls, parts: Sequence[SdPrompts]) -> SdPrompts:
        rows = tuple(n for part in parts for n in part.rows)
        states, weights = zip(*(part._extended(max(rows)) for part in parts), strict=True)
        return cls(torch.cat(states), torch.cat(weights), torch.cat([part.padding for part in parts]), rows=rows)


def equally_long(positive: SdPrompts, negative: SdPrompts) -> tuple[SdConditioning, SdConditioning]:
    """Prompts and negative prompts as the U-Net takes them together: the longer decides, the other is padded with empty rows."""
    rows = max(*positive.rows, *negative.rows)
    return positive.conditioning(rows), negative.conditioning(rows)


class SdTextEncoder(nn.Module):
    """A CLIP text encoder with its tokenizer and the options that decide what becomes of a caption."""

    def __init__(
        self,
        model: ClipTextModel,
        tokenizer: ClipTokenizer,
        *,
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        weighted_captions: bool = False,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.layers = model.config.layers - (clip_skip or 1) + 1  # whose output is used; the others are not computed
        self.tokens = max_token_length or PIECE
        self.weighted_captions = weighted_captions

    def encode(self, captions: Sequence[str], device: torch.device | str | None = None) -> SdConditioning:
        """States (B, 75 n + 2, D) on ``device`` (default: the model's), in the model's dtype. The caller sets gradient mode."""
        texts = [self.tokenizer.rows(text, tokens=self.tokens, weighted=self.weighted_captions) for text in captions]
        states = joined(weighed(self._states(texts), texts))
        return SdConditioning(states if device is None else states.to(device))

    def encode_prompts(self, texts: Sequence[str], device: torch.device | str | None = None) -> SdPrompts:
        """Prompts for pictures: up to three rows, as many as each needs; weights are always read."""
        found = [self.tokenizer.prompt_rows(text) for text in texts]
        empty = self.tokenizer.prompt_rows("")
        rows = tuple(len(text.ids) for text in found)
        filled = [_lengthened(text, empty, max(rows)) for text in found]
        states = self._states([*filled, _lengthened(empty, empty, max(rows))])  # (B + 1, n, 77, D)
        weights = weight_tensor(filled, states.device)
        prompts = SdPrompts(states[:-1], weights, states[-1:, 0].expand(len(texts), -1, -1), rows=rows)
        return prompts if device is None else prompts.to(device)

    def _states(self, texts: Sequence[TokenRows]) -> Tensor:
        """Normed states (B, n, 77, D) of the layer that --clip_skip asks for; every text has n rows."""
        ids, places = unique_rows(texts)
        x = self.model.run(self.model.embed(sent_ids(ids, self.model)), 0, self.layers)
        return by_text(self.model.normed(x), places, len(texts))


# ---------------------------------------------------------------- rows


def unique_rows(texts: Sequence[TokenRows]) -> tuple[list[list[int]], list[int] | None]:
    """The rows of all texts below each other, and None; without gradients each row only once, and the place of each row then.

    Rows of padding are alike for all captions, and are most of what there is with a large --max_token_length.
    """
    rows = stacked(texts).ids
    if torch.is_grad_enabled():  # each row has dropout of its own
        return rows, None
    unique: dict[tuple[int, ...], int] = {}
    places = [unique.setdefault(tuple(row), len(unique)) for row in rows]
    return [list(row) for row in unique], places if len(unique) < len(rows) else None


def by_text(states: Tensor, places: list[int] | None, texts: int) -> Tensor:
    """states (rows, 77, D) -> (texts, n, 77, D); ``places`` of ``unique_rows``."""
    if places is not None:
        states = states[sent(torch.tensor(places), states.device)]
    return states.unflatten(0, (texts, -1))


def sent_ids(rows: list[list[int]], model: ClipTextModel) -> Tensor:
    return sent(torch.tensor(rows), next(model.parameters()).device)


def _lengthened(text: TokenRows, empty: TokenRows, rows: int) -> TokenRows:
    missing = rows - len(text.ids)
    return TokenRows(text.ids + empty.ids * missing, text.weights + empty.weights * missing)


def weight_tensor(texts: Sequence[TokenRows], device: torch.device) -> Tensor:
    """(B, n, 77) float32"""
    return sent(torch.tensor([text.weights for text in texts]), device)


def weighed(states: Tensor, texts: Sequence[TokenRows]) -> Tensor:
    """states (B, n, 77, D) times the weights of their tokens, in their dtype."""
    if all(weight == 1 for text in texts for row in text.weights for weight in row):
        return states
    return (states.float() * weight_tensor(texts, states.device)[..., None]).to(states.dtype)


def joined(states: Tensor) -> Tensor:
    """(B, n, 77, D) -> (B, 75 n + 2, D): the first start mark, the text of all rows, the last end mark."""
    if states.shape[1] == 1:
        return states[:, 0]
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)


# ---------------------------------------------------------------- building


def build_text_encoder(
    parts: Sequence[Part[ClipConfig]],
    *,
    v2: bool,
    clip_skip: int | None = None,
    max_token_length: int | None = None,
    weighted_captions: bool = False,
    fp8: bool = False,
) -> SdTextEncoder:
    """The text encoder of ``parts`` (one), on the meta device, and its tokenizer. Raises OptionError for a clip_skip that the
    encoder has no layers for."""
    (part,) = parts
    if problem := clip_skip_problem(clip_skip, part.config.layers):
        raise OptionError(problem)
    (tokenizer,) = load_tokenizers(OPEN_CLIP_H if v2 else CLIP_L)
    return SdTextEncoder(
        build_clip(part.config, fp8=fp8),
        tokenizer,
        clip_skip=clip_skip,
        max_token_length=max_token_length,
        weighted_captions=weighted_captions,
    ).eval()


def load_text_encoder(
    encoder: nn.Module,
    parts: Sequence[Part[ClipConfig]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Streams the weights of ``parts`` into an encoder built from them, frozen, in ``dtype`` on ``device``."""
    for model, part in zip(text_models(encoder), parts, strict=True):
        load_clip(model, part, device=device, dtype=dtype)


def text_models(encoder: nn.Module) -> list[ClipTextModel]:
    """The encoder's models in the order of --text_encoder_lr."""
    return list(_models(encoder))


def _models(encoder: nn.Module) -> Iterator[ClipTextModel]:
    return (module for module in encoder.children() if isinstance(module, ClipTextModel))
