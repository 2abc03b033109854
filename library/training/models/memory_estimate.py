"""How much memory of the device training will take: computed from sizes, before a weight is loaded.

What a step keeps: the frozen weights, the network with its gradients and optimizer, and the activations that the backward pass
needs. The programs that run on the device (CUDA's context, work space of the kernels) come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.memory.block_swap import RINGS, streamed_weights
from library.nn.fp8 import fp8_layers
from library.nn.memory_use import MemoryUse
from library.training.models.model_memory import blocks_to_swap
from library.training.optimizing.optimizer_names import optimizer_source

if TYPE_CHECKING:
    from library.dataset.items import TrainingSet

MIB, GIB = 2**20, 2**30
# bytes of an optimizer's state per weight in float32, by a part of its class's name; other classes: two moments
STATE_BYTES = {"8bit": 2, "adafactor": 0, "lion": 4, "sgd": 4}
MOMENTS = 8
KEPT_COPIES = 2  # of the trained weights: those of the last steps whose loss was finite


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device, and the batch that they are for."""

    size_wh: tuple[int, int]  # pixels
    images: int
    model: int
    encoders: int  # text encoder and VAE, where they encode at every step
    network: int
    activations: int

    @property
    def total(self) -> int:
        return self.model + self.encoders + self.network + self.activations


def largest_batch(training_set: TrainingSet) -> tuple[tuple[int, int], int]:
    """(width, height) in pixels and the number of images of the batch with the most pixels."""
    batches = [(item.bucket_wh, training_set.datasets[item.dataset_index].batch_size) for item in training_set.items]
    return max(batches, key=lambda batch: math.prod(batch[0]) * batch[1])


def weight_bytes(model: nn.Module, dtype: torch.dtype, *, swapped: int = 0) -> int:
    """Of the model on the device, once it is loaded in ``dtype``; with block swap, without what waits on the host."""
    rounded = {id(layer.weight) for layer in fp8_layers(model)}

    def size(weight: nn.Parameter) -> int:
        return weight.numel() * (1 if id(weight) in rounded else dtype.itemsize)

    whole = sum(map(size, model.parameters())) + sum(b.numel() * dtype.itemsize for b in model.buffers() if b.is_floating_point())
    if not swapped:
        return whole
    in_blocks: Any = model.blocks
    streamed = set(streamed_weights(in_blocks, swapped))
    blocks = len({name.split(".")[0] for name in streamed})
    on_host = sum(size(weight) for name, weight in in_blocks.named_parameters() if name in streamed)
    return whole - on_host + RINGS * on_host // blocks


def network_bytes(parameters: int, dtype: torch.dtype, optimizer: Any, *, fused: bool) -> int:
    """Weights, gradients, copies and the optimizer's state of a network of so many parameters."""
    return parameters * ((1 + KEPT_COPIES + (not fused)) * dtype.itemsize + moment_bytes(dtype, optimizer))


def saved_state_bytes(parameters: int, dtype: torch.dtype, optimizer: Any) -> int:
    """Of a state on the disk: the network's weights and the optimizer's state."""
    return parameters * (dtype.itemsize + moment_bytes(dtype, optimizer))


def moment_bytes(dtype: torch.dtype, optimizer: Any) -> int:
    """Of the optimizer's state, per weight."""
    name = optimizer_source(optimizer).path.lower()
    return next((size for part, size in STATE_BYTES.items() if part in name), MOMENTS) * dtype.itemsize // 4


def activation_bytes(use: MemoryUse, dtype: torch.dtype, *, checkpointing: str | None) -> int:
    """``checkpointing`` as in library/options/memory.py: on the device, or with what it keeps in host memory."""
    always = use.outside + use.working
    if checkpointing is None:
        return (sum(use.kept) + always + use.encoder_kept) * dtype.itemsize
    largest = sorted(use.carried, reverse=True)
    waiting = sum(largest if checkpointing == "device" else largest[:2])  # of two: the block's own, and the one on its way
    return (waiting + max(use.kept, default=0) + always + use.encoder_carried) * dtype.itemsize


def estimate_memory(options: Any, denoiser: nn.Module, *, parameters: int, dtypes: tuple[torch.dtype, torch.dtype],
                    use: MemoryUse, batch: tuple[tuple[int, int], int]) -> MemoryEstimate:  # fmt: skip
    """``parameters``: of the network; ``dtypes``: of the frozen model and of the network; ``use``: of ``batch``."""
    model, network = dtypes
    fused = options.memory.fused_backward_pass
    return MemoryEstimate(
        size_wh=batch[0],
        images=batch[1],
        model=weight_bytes(denoiser, model, swapped=blocks_to_swap(options)),
        encoders=use.encoders * model.itemsize,
        network=network_bytes(parameters, network, options.optimizer, fused=fused),
        activations=activation_bytes(use, model, checkpointing=options.memory.checkpointing),
    )


def estimate_lines(estimate: MemoryEstimate, device_bytes: int | None, options: Any) -> Iterator[str]:
    """For the plan; with a warning where the device has less."""
    width, height = estimate.size_wh
    parts = {"model": estimate.model, "text encoder and VAE": estimate.encoders, "network and optimizer": estimate.network,
             "activations": estimate.activations}  # fmt: skip
    unit = size_unit(estimate.total)
    told = ", ".join(f"{name} {size_text(size, unit)}" for name, size in parts.items() if size)
    images = f"{estimate.images} of {width}x{height}"
    yield f"  memory of the device: about {size_text(estimate.total, unit)} {unit} for {images} ({told}), besides its programs"
    if device_bytes is not None and estimate.total > device_bytes:
        yield f"    it has {size_text(device_bytes, unit)} {unit}: {advice(options)}"


def size_unit(size: int) -> str:
    return "GiB" if size >= GIB else "MiB"


def size_text(size: int, unit: str) -> str:
    return f"{size / (GIB if unit == 'GiB' else MIB):.1f}"


def advice(options: Any) -> str:
    """What is not in use yet and saves memory, the cheapest first."""
    flags = {
        "--mixed_precision=bf16": options.run.mixed_precision == "no",
        "--cache_latents": not options.caches.latents_cached,
        "--cache_text_encoder_outputs": not (options.caches.text_cached or options.trains_text_encoder),
        "--gradient_checkpointing": options.memory.checkpointing is None,
        "--fp8_base_unet": not (options.memory.fp8_base or options.memory.fp8_base_unet),
        "--unsloth_offload_checkpointing": options.memory.checkpointing == "device" and hasattr(options.memory, "blocks_to_swap"),
        "--blocks_to_swap": hasattr(options.memory, "blocks_to_swap") and not blocks_to_swap(options),
        "--optimizer_type=AdamW8bit": "8bit" not in optimizer_source(options.optimizer).path,
        "--vae_batch_size=1": options.caches.vae_batch_size > 1,
        "--vae_chunk_size=64": getattr(getattr(options, "anima", None), "vae_chunk_size", 1) is None,
    }
    unused = [flag for flag, helps in flags.items() if helps]
    return f"what would save memory: {', '.join([*unused, 'a smaller batch_size', 'a smaller resolution'])}"
