"""Puts the frozen models where the options say that their weights and activations shall be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from library.nn.checkpointing import run_checkpointed
from library.nn.loading import Place


def denoiser_place(options: Any, denoiser: nn.Module, device: torch.device) -> Place:
    """Where each weight of the denoiser is loaded to."""
    return device


def arrange_denoiser(options: Any, denoiser: nn.Module, device: torch.device) -> None:
    """Called once, when the weights are loaded and merged and the network is on the device."""
    if options.memory.checkpointing is not None:
        for part in _runs_blocks(denoiser):
            part.run_block = run_checkpointed


def arrange_text_encoders(options: Any, encoders: Iterable[Any]) -> None:
    """transformers' models that a LoRA is trained on. They checkpoint in training mode only; their own dropout is 0."""
    if options.memory.checkpointing is not None:
        for encoder in encoders:
            name = "activation_checkpointing_enable"  # transformers 5.20 and later; before, gradient_...
            enable = getattr(encoder, name, None) or encoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            encoder.train()


def _runs_blocks(model: nn.Module) -> Iterator[Any]:
    """The parts of a model that call transformer blocks: the model itself, and Anima's LLM adapter."""
    return (part for part in model.modules() if hasattr(part, "run_block"))
