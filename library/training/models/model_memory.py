"""Puts the frozen models where the options say that their weights and activations shall be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from library.memory.activation_offload import OffloadingRunner
from library.memory.block_swap import BlockSwap, SwappingRunner, streamed_weights
from library.memory.transfer import PlainTransfer, transfer_for
from library.nn.blocks import BlockRunner
from library.nn.checkpointing import run_checkpointed
from library.nn.loading import Place
from library.nn.precision import OwnPrecision


def denoiser_place(options: Any, denoiser: nn.Module, device: torch.device) -> Place:
    """Where each weight of the denoiser is loaded to: the device, but for what block swap keeps in host memory."""
    swapped = blocks_to_swap(options)
    if not swapped:
        return device
    blocks = _blocks(denoiser)
    within = next(name for name, module in denoiser.named_modules() if module is blocks)  # of a LoRA's denoiser, too
    on_host = {f"{within}.{name}" for name in streamed_weights(blocks, swapped)}
    return lambda name: "cpu" if name in on_host else device


def arrange_denoiser(options: Any, denoiser: nn.Module, device: torch.device) -> None:
    """Called once, when the weights are loaded, merged and in their number format, and the network is on the device.

    From then on the denoiser's blocks must be called through its ``run_block``, and their weights stay as they are.
    """
    checkpointing = options.memory.checkpointing
    if checkpointing is not None:
        for part in _runs_blocks(denoiser):  # Anima's LLM adapter is small: what it keeps stays on the device
            part.run_block = run_checkpointed
        denoiser.run_block = block_runner(checkpointing, device)  # type: ignore[assignment]
    if swapped := blocks_to_swap(options):
        swap = BlockSwap(_blocks(denoiser), swapped, device=device, transfer=transfer_for(device))
        denoiser.run_block = SwappingRunner(swap, denoiser.run_block)  # type: ignore[assignment,arg-type]


def arrange_text_encoders(options: Any, encoders: Sequence[Any]) -> None:
    """Models that a LoRA is trained on. transformers' own checkpoint in training mode only; their dropout is 0."""
    for encoder in encoders:
        if isinstance(encoder, OwnPrecision):
            encoder.takes_autocast = True
    if options.memory.checkpointing is not None:
        for encoder in encoders:
            name = "activation_checkpointing_enable"  # transformers 5.20 and later; before, gradient_...
            enable = getattr(encoder, name, None) or encoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            encoder.train()


def block_runner(checkpointing: str, device: torch.device) -> BlockRunner:
    """How checkpointed blocks run; ``checkpointing`` as in library/options/memory.py."""
    if checkpointing == "cpu":
        return OffloadingRunner(PlainTransfer(), ahead=False)
    if checkpointing == "cpu_async":
        return OffloadingRunner(transfer_for(device), ahead=True)
    return run_checkpointed


def blocks_to_swap(options: Any) -> int:
    """0 where nothing is swapped, or where the architecture has no such option."""
    return getattr(options.memory, "blocks_to_swap", None) or 0


def _blocks(denoiser: Any) -> nn.ModuleList:
    return denoiser.blocks


def _runs_blocks(model: nn.Module) -> Iterator[Any]:
    """The parts of a model that call transformer blocks: the model itself, and Anima's LLM adapter."""
    return (part for part in model.modules() if hasattr(part, "run_block"))
