"""Several processes, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from library.options.declare import opt
from library.options.rules import at_least

OFFLOAD_DEVICES = ("cpu", "nvme")
ONLY_DEEPSPEED = ("zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device",
                  "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model",
                  "fp16_master_weights_and_gradients")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedOptions:
    """Several processes: how they work together, started by accelerate launch."""

    ddp_timeout: int | None = opt(
        None, "minutes that processes wait for each other while they train (not set or 0 = PyTorch's default)"
    )
    ddp_gradient_as_bucket_view: bool = opt(False, "sum gradients where they lie instead of in a copy, as is always done here")
    ddp_static_graph: bool = opt(False, "promise that every step uses the same weights, which nothing here needs to know")
    deepspeed: bool = opt(False, "train with DeepSpeed; refused, with what to use instead")
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
        yield from at_least(self, 0, "ddp_timeout")
        if self.deepspeed:
            yield (
                "--deepspeed cannot be used: it spreads the memory of what is trained over the GPUs, which of a LoRA is little, "
                "and would take over summing gradients, skipping bad steps and the states, which are this trainer's; drop it: "
                "accelerate launch --multi_gpu trains on several GPUs, and --fp8_base, --gradient_checkpointing or "
                "--blocks_to_swap save memory"
            )

    def warnings(self) -> Iterator[str]:
        for option in fields(self):
            if option.name in ONLY_DEEPSPEED and getattr(self, option.name) != option.default:
                yield f"--{option.name} does nothing without --deepspeed"
