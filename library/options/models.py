"""The model files that every architecture has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Model: the checkpoints to train on."""

    pretrained_model_name_or_path: str | None = opt(
        None, "checkpoint of the frozen model that the LoRA is trained for", path=True
    )
    vae: str | None = opt(None, "checkpoint of the image coder (VAE)", path=True)
    no_half_vae: bool = opt(False, "run the VAE in float32 whatever --mixed_precision says; cures black or NaN images")

    def problems(self) -> Iterator[str]:
        return iter(())
