"""Several processes, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least

OFFLOAD_DEVICES = ("cpu", "nvme")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedOptions:
    """Several processes: how they work together, started by accelerate launch."""

    ddp_timeout: int | None = opt(None, "minutes that a process waits for the others to start (not set = PyTorch's default)")
    ddp_gradient_as_bucket_view: bool = opt(False, "sum gradients where they lie, as is always done here")
    ddp_static_graph: bool = opt(False, "promise that every step uses the same weights, which nothing here needs to know")
    deepspeed: bool = opt(False, "train with DeepSpeed")
    zero_stage: int = opt(2, "what DeepSpeed's processes share among them: 1 = optimizer, 2 = also gradients, 3 = also weights",
                          choices=(0, 1, 2, 3))  # fmt: skip
    offload_optimizer_device: str | None = opt(
        None, "where DeepSpeed keeps the optimizer (not set = the GPU)", choices=OFFLOAD_DEVICES
    )
    offload_optimizer_nvme_path: str | None = opt(None, "folder for --offload_optimizer_device=nvme (not set = none)", path=True)
    offload_param_device: str | None = opt(None, "where DeepSpeed keeps weights (not set = the GPU)", choices=OFFLOAD_DEVICES)
    offload_param_nvme_path: str | None = opt(None, "folder for --offload_param_device=nvme (not set = none)", path=True)
    zero3_init_flag: bool = opt(False, "DeepSpeed stage 3: share weights from the moment they are made")
    zero3_save_16bit_model: bool = opt(False, "DeepSpeed stage 3: gather the 16-bit weights when saving")
    fp16_master_weights_and_gradients: bool = opt(False, "DeepSpeed stage 2 with the optimizer on the CPU: keep it in fp16")

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "ddp_timeout")
