"""Which kernel computes attention in the denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

ATTENTION_MODES = ("torch", "xformers", "flash", "sageattn", "sdpa")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """Attention: the kernel that the denoiser's attention uses. Results differ by rounding only."""

    attn_mode: str | None = opt(
        None, "torch and sdpa = PyTorch's own; the others need their packages; not set = torch", choices=ATTENTION_MODES
    )
    split_attn: bool = opt(False, "compute attention one image of the batch at a time; less memory in large batches")
    xformers: bool = opt(False, "the older way to write --attn_mode=xformers")
    sdpa: bool = opt(False, "the older way to write --attn_mode=torch, the default")
    mem_eff_attn: bool = opt(False, "attention in pieces, for old PyTorch; does nothing more than PyTorch's own")

    @property
    def mode(self) -> str:
        """The kernel in use: torch, xformers, flash or sageattn."""
        named = "xformers" if self.xformers else self.attn_mode
        return "torch" if named in (None, "sdpa") else str(named)

    def problems(self) -> Iterator[str]:
        modes = {"torch" if mode == "sdpa" else mode for mode in (self.attn_mode, *self._old_flags()) if mode}
        if len(modes) > 1:
            named = [f"--attn_mode={self.attn_mode}"] if self.attn_mode else []
            yield f"{' and '.join([*named, *(f'--{flag}' for flag in self._old_flags())])} name different kernels: keep one"

    def warnings(self) -> Iterator[str]:
        if self.mem_eff_attn:
            yield "--mem_eff_attn does nothing: PyTorch's own attention, which is in use, keeps no attention matrix either"

    def _old_flags(self) -> list[str]:
        return [name for name in ("xformers", "sdpa") if getattr(self, name)]
