"""What --network_args and the rates of parts mean to networks.lora_anima. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from networks.anima_layouts import ANIMA_NAMES
from networks.arguments import NetworkArguments, argument, component_flags, component_rate, parse_bool
from networks.layout_names import NameTable


@dataclass(frozen=True, kw_only=True)
class AnimaArguments(NetworkArguments):
    PAGE: ClassVar[str] = "docs/anima_train_network.md"
    NAMES: ClassVar[NameTable | None] = ANIMA_NAMES

    train_llm_adapter: bool = argument(parse_bool, "also the Linears of the LLM adapter's blocks", default=False)
    self_attn_lr: float | None = component_rate("self_attn")
    cross_attn_lr: float | None = component_rate("cross_attn")
    mlp_lr: float | None = component_rate("mlp")
    mod_lr: float | None = component_rate("mod")
    llm_adapter_lr: float | None = component_rate("llm_adapter")


COMPONENT_RATES = component_flags(AnimaArguments)  # what the trainer may pass besides --network_args
