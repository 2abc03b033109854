"""SD3's text side: captions -> states of CLIP-L and CLIP-G, joined on channels, behind them those of T5, and a pooled vector.

B captions · 77 tokens of each CLIP · T tokens of T5 (256; 0 without it) · D context width (4096)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_WITHOUT_T5 = 77  # of zeros, which stand for T5's in the context


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
