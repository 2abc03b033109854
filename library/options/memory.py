"""What trades speed for memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """Memory: what trades speed for memory."""

    gradient_checkpointing: bool = opt(False, "compute activations again in the backward pass: much less memory, slower steps")
    cpu_offload_checkpointing: bool = opt(
        False, "as --gradient_checkpointing, and what it keeps waits in CPU memory; each block waits for its copy"
    )
    fp8_base: bool = opt(False, "keep the frozen weights of the denoiser and of the text encoder in 8 bits")
    fp8_base_unet: bool = opt(False, "keep the frozen weights of the denoiser in 8 bits, those of the text encoder not")
    fused_backward_pass: bool = opt(
        False, "change each weight as soon as its gradient is there, and free the gradient; needs --max_grad_norm=0"
    )
    lowram: bool = opt(False, "load models straight to the GPU, which is always done here")
    highvram: bool = opt(False, "do not give GPU memory back between encoding images and captions; faster where there is plenty")
    disable_mmap_load_safetensors: bool = opt(
        False, "read .safetensors files without mapping them into memory, as is always done here"
    )

    @property
    def checkpointing(self) -> str | None:
        """Where checkpointed activations wait: "device", "cpu", "cpu_async", or None without checkpointing."""
        if self.cpu_offload_checkpointing:
            return "cpu"
        return "device" if self.gradient_checkpointing else None

    def problems(self) -> Iterator[str]:
        return iter(())


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMemoryOptions(MemoryOptions):
    """Memory: what trades speed for memory."""

    unsloth_offload_checkpointing: bool = opt(
        False, "as --cpu_offload_checkpointing, with copies that go on while the GPU computes"
    )
    blocks_to_swap: int | None = opt(
        None, "transformer blocks whose weights wait in CPU memory until they are needed, at most all but 2 (not set or 0 = none)"
    )

    @property
    def checkpointing(self) -> str | None:
        return "cpu_async" if self.unsloth_offload_checkpointing else MemoryOptions.checkpointing.fget(self)  # type: ignore[attr-defined]

    def problems(self) -> Iterator[str]:
        yield from MemoryOptions.problems(self)
        yield from at_least(self, 0, "blocks_to_swap")
        if self.cpu_offload_checkpointing and self.unsloth_offload_checkpointing:
            yield "--cpu_offload_checkpointing and --unsloth_offload_checkpointing are two ways to do one thing: keep one"
