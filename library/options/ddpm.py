"""What only models with a table of noise levels (DDPM: Stable Diffusion 1, 2 and XL) have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import above_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class DdpmOptions:
    """Stable Diffusion's noise: targets and loss weights of models with a table of noise levels."""

    v_parameterization: bool = opt(False, "the model predicts velocity (v) instead of noise")
    zero_terminal_snr: bool = opt(False, "change the table of noise levels so that its last one is pure noise")
    min_snr_gamma: float | None = opt(None, "weigh low noise less: min-SNR with this gamma, often 5 (not set = all alike)")
    scale_v_pred_loss_like_noise_pred: bool = opt(False, "weigh the loss of velocity as that of noise")
    v_pred_like_loss: float | None = opt(None, "add this times a velocity-like loss (not set = nothing)")
    debiased_estimation_loss: bool = opt(False, "weigh the loss by 1 / sqrt(SNR)")

    def problems(self) -> Iterator[str]:
        yield from above_zero(self, "min_snr_gamma")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOptions:
    """Stable Diffusion's text: its CLIP encoders and tokenizers."""

    v2: bool = opt(False, "the checkpoint is Stable Diffusion 2.x")
    clip_skip: int | None = opt(None, "use the N-th layer of CLIP counted from the end (not set = the last)")
    max_token_length: int | None = opt(None, "CLIP tokens of a caption that count (not set = 75)", choices=(150, 225))
    weighted_captions: bool = opt(False, "read (text:1.2) in captions as a weight")
    tokenizer_cache_dir: str | None = opt(None, "folder that keeps downloaded tokenizers (not set = the hub's own)", path=True)

    def problems(self) -> Iterator[str]:
        return iter(())
