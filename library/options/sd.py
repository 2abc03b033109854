"""Options of train_network.py and sdxl_train_network.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.options.train import TrainOptions


@dataclass(frozen=True, kw_only=True)
class StableDiffusionTrainOptions(TrainOptions):
    """All options of train_network.py (Stable Diffusion 1.x and 2.x), in groups."""

    NETWORK_MODULE: ClassVar[str] = "networks.lora"


@dataclass(frozen=True, kw_only=True)
class SdxlTrainOptions(StableDiffusionTrainOptions):
    """All options of sdxl_train_network.py, in groups."""
