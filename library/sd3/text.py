"""SD3's text side: captions -> states of CLIP-L and CLIP-G, joined on channels, behind them those of T5, and a pooled vector.

B captions · 77 tokens of each CLIP · T tokens of T5 (256; 0 without it) · D context width (4096)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import CheckpointError
from library.nn.transfer import sent
from library.sd.clip import ClipTextModel, build_clip, causal_mask, load_clip
from library.sd.clip_tokenizer import ROW, ClipTokenizer
from library.sd3.layout import Sd3TextParts
from library.sd3.t5 import T5Encoder, build_t5, load_t5_weights
from library.sd3.tokenizers import T5_TOKENS, Sd3Tokenizers, load_sd3_tokenizers
from library.sdxl.text import end_of

ROWS_WITHOUT_T5 = 77  # of zeros, which stand for T5's in the context
T5_BATCH = 16  # captions that T5 takes at once where nothing is trained: a few GiB less for long ones, and no slower


@dataclass(frozen=True, slots=True, eq=False)
class Sd3Conditioning:
    """Text conditioning of B captions, by encoder. Rows of padding are kept: the model was trained with them.

    Each encoder's tensors have its dtype. All captions of a run have the same T.
    """

    l_states: Tensor  # (B, 77, 768) before CLIP-L's last layer, without the final norm
    g_states: Tensor  # (B, 77, 1280) the same of CLIP-G
    t5_states: Tensor  # (B, T, D); T = 0: there is no T5
    l_pooled: Tensor  # (B, 768)
    g_pooled: Tensor  # (B, 1280)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.l_states, self.g_states, self.t5_states, self.l_pooled, self.g_pooled

    @property
    def pooled(self) -> Tensor:
        """(B, 2048)"""
        return torch.cat([self.l_pooled, self.g_pooled], dim=-1)

    def context(self, width: int) -> Tensor:
        """(B, 77 + T, ``width``): CLIP's tokens, with zeros in the channels that they lack, then T5's, or 77 rows of zeros."""
        clip = torch.cat([self.l_states, self.g_states], dim=-1)  # (B, 77, 2048)
        clip = F.pad(clip, (0, width - clip.shape[-1]))  # (B, 77, D)
        t5 = self.t5_states if self.t5_states.shape[1] else clip.new_zeros(len(clip), ROWS_WITHOUT_T5, width)
        return torch.cat([clip, t5], dim=1)  # of two dtypes the wider

    def dropped(self, l: Tensor, g: Tensor, t5: Tensor) -> Sd3Conditioning:  # noqa: E741  # as the encoders are called
        """Zeros in place of what an encoder gave, where its tensor (B,) of bools on this device is True."""
        of_tensor = (l, g, t5, l, g)
        return Sd3Conditioning(
            *(
                own.masked_fill(drop.view(-1, *[1] * (own.ndim - 1)), 0)
                for own, drop in zip(self._tensors, of_tensor, strict=True)
            )
        )

    def with_t5(self, other: Sd3Conditioning) -> Sd3Conditioning:
        """The CLIPs' part of this with the T5 states of ``other``, of the same captions: T5 cached while the CLIPs train."""
        return replace(self, t5_states=other.t5_states)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Sd3Conditioning:
        return Sd3Conditioning(*(tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors))

    def pin_memory(self) -> Sd3Conditioning:
        return Sd3Conditioning(*(tensor.pin_memory() for tensor in self._tensors))

    def split(self) -> list[Sd3Conditioning]:
        return [Sd3Conditioning(*(tensor[i : i + 1] for tensor in self._tensors)) for i in range(len(self.l_states))]

    def rows(self, places: Tensor) -> Sd3Conditioning:
        """The captions at ``places`` (B',) int64 on this device; one may stand several times."""
        return Sd3Conditioning(*(tensor[places] for tensor in self._tensors))

    def cache_tensors(self) -> dict[str, Tensor]:
        """Of ONE caption, under the names of the fields, in their dtypes; ``t5_states`` (0, D) without T5."""
        if len(self.l_states) != 1:
            raise ValueError(f"a cache entry holds one caption, not {len(self.l_states)}: split() first")
        return {name: tensor[0] for name, tensor in zip(FIELDS, self._tensors, strict=True)}

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]]) -> Sd3Conditioning:
        return cls(*(tensors[name] for name in FIELDS))

    @classmethod
    def stack(cls, parts: Sequence[Sd3Conditioning]) -> Sd3Conditioning:
        return cls(*(torch.cat(tensors) for tensors in zip(*(part._tensors for part in parts), strict=True)))


FIELDS = tuple(field.name for field in fields(Sd3Conditioning))


class Sd3TextEncoder(nn.Module):
    """CLIP-L, CLIP-G and T5 with their tokenizers; without T5 where its states come from a cache, or there is none. Each may be
    on a device of its own and have a dtype of its own."""

    def __init__(
        self,
        clip_l: ClipTextModel,
        clip_g: ClipTextModel,
        t5: T5Encoder | None,
        tokenizers: Sd3Tokenizers,
        *,
        mask_clip: bool = False,
        mask_t5: bool = False,
    ):
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers = tokenizers
        self.mask_clip, self.mask_t5 = mask_clip, mask_t5  # whether tokens see no padding

    def encode(self, captions: Sequence[str], device: torch.device | str | None = None) -> Sd3Conditioning:
        """On ``device`` (default: CLIP-L's), each encoder's tensors in its dtype. The caller sets gradient mode.

        Without gradients captions that are alike are encoded once.
        """
        place = device_of(self.clip_l) if device is None else torch.device(device)
        texts = list(captions) if torch.is_grad_enabled() else list(dict.fromkeys(captions))
        l_states, l_pooled = self._clip(self.clip_l, self.tokenizers.clip_l, texts)
        g_states, g_pooled = self._clip(self.clip_g, self.tokenizers.clip_g, texts)
        t5_states = self._t5(texts)
        if t5_states is None:
            t5_states = l_states.new_zeros(len(texts), 0, l_states.shape[-1] + g_states.shape[-1])
        found = Sd3Conditioning(l_states, g_states, t5_states, l_pooled, g_pooled).to(place)
        if len(texts) == len(captions):
            return found
        numbers = {text: number for number, text in enumerate(texts)}
        return found.rows(sent(torch.tensor([numbers[caption] for caption in captions]), place))

    def _clip(self, model: ClipTextModel, tokenizer: ClipTokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, 77, D) before the last layer, without the final norm, and pooled (B, D), where that is."""
        device = device_of(model)
        rows = [tokenizer.rows(text).ids[0] for text in texts]
        ends = sent(torch.tensor([end_of(row) for row in rows]), device)
        mask = causal_mask(torch.arange(ROW, device=device) <= ends[:, None]) if self.mask_clip else None
        layers = model.config.layers
        states = model.run(model.embed(sent(torch.tensor(rows), device)), 0, layers - 1, mask)
        return states, model.pooled(model.run(states, layers - 1, layers, mask), ends)

    def _t5(self, texts: Sequence[str]) -> Tensor | None:
        """(B, T, D), where T5 is; rows of padding included."""
        if self.t5 is None or self.tokenizers.t5 is None:
            return None
        device = device_of(self.t5)
        rows = [self.tokenizers.t5.row(text) for text in texts]
        ids = sent(torch.tensor([row.ids for row in rows]), device)  # (B, T)
        mask = None
        if self.mask_t5:
            used = sent(torch.tensor([row.used for row in rows]), device)
            mask = torch.arange(ids.shape[1], device=device) < used[:, None]  # (B, T)
        size = len(rows) if torch.is_grad_enabled() else T5_BATCH
        starts = range(0, len(rows), size)
        parts = (slice(start, start + size) for start in starts)
        return torch.cat([self.t5(ids[part], None if mask is None else mask[part]) for part in parts])


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---------------------------------------------------------------- building


def build_text_encoder(
    parts: Sd3TextParts,
    *,
    t5_tokens: int = T5_TOKENS,
    mask_clip: bool = False,
    mask_t5: bool = False,
    fp8: bool = False,
    t5_fp8: bool = False,
) -> Sd3TextEncoder:
    """The text encoders of ``parts`` on the meta device, and their tokenizers. ``fp8``, ``t5_fp8``: the layers of all of them, or
    of T5 alone, take their weights in 8 bits. Raises CheckpointError for a CLIP-G that makes no pooled vector; of a CLIP-L
    without a projection the vector is taken as it is."""
    if parts.clip_g.config.projection is None:
        raise CheckpointError(f"{parts.clip_g.source.path}: this CLIP-G has no text_projection.weight, which SD3 needs; give the "
                              "clip_g file that was published for SD3 or SDXL")  # fmt: skip
    return Sd3TextEncoder(
        build_clip(parts.clip_l.config, fp8=fp8),
        build_clip(parts.clip_g.config, fp8=fp8),
        None if parts.t5 is None else build_t5(parts.t5.config, fp8=fp8 or t5_fp8),
        load_sd3_tokenizers(t5_tokens=None if parts.t5 is None else t5_tokens),
        mask_clip=mask_clip,
        mask_t5=mask_t5,
    ).eval()


def load_text_encoder(  # noqa: PLR0913  # T5 may have a place of its own
    encoder: Sd3TextEncoder,
    parts: Sd3TextParts,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    t5_device: torch.device | str | None = None,
    t5_dtype: torch.dtype | None = None,
) -> None:
    """Streams the weights of ``parts`` into an encoder built from them, frozen. T5 goes where the others go, unless told
    otherwise."""
    load_clip(encoder.clip_l, parts.clip_l, device=device, dtype=dtype)
    load_clip(encoder.clip_g, parts.clip_g, device=device, dtype=dtype)
    if encoder.t5 is not None and parts.t5 is not None:
        load_t5_weights(encoder.t5, parts.t5, device=t5_device or device, dtype=t5_dtype or dtype)


def text_models(encoder: Sd3TextEncoder) -> list[nn.Module]:
    """The encoders in the order of --text_encoder_lr: CLIP-L, CLIP-G, and T5 where there is one."""
    return [encoder.clip_l, encoder.clip_g, *([] if encoder.t5 is None else [encoder.t5])]
