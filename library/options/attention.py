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
        """torch, xformers, flash or sageattn: --attn_mode wins over the older flags, --xformers over --sdpa."""
        named = self.attn_mode or ("xformers" if self.xformers else "torch")
        return "torch" if named == "sdpa" else named

    @property
    def flag(self) -> str:
        """As it was typed."""
        return "--xformers" if self.attn_mode is None and self.xformers else f"--attn_mode={self.mode}"

    def problems(self) -> Iterator[str]:
        return iter(())

    def warnings(self) -> Iterator[str]:
        for flag, kernel in (("xformers", "xformers"), ("sdpa", "torch")):
            if getattr(self, flag) and self.mode != kernel:
                yield f"--{flag} does nothing: attention is computed by {self.mode}, which another flag names"
        if self.mem_eff_attn:
            yield "--mem_eff_attn does nothing: PyTorch's own attention, which is in use, keeps no attention matrix either"
