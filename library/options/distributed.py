"""Several processes, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from library.options.declare import opt
from library.options.rules import at_least

OFFLOAD_DEVICES = ("cpu", "nvme")
ONLY_STAGE_3 = ("offload_param_device", "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model")
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
    deepspeed: bool = opt(False, "train with DeepSpeed: the processes share the optimizer's memory among them")
    zero_stage: int = opt(2, "what DeepSpeed's processes share: 0 = nothing, 1 = the optimizer, 2 = also gradients; 3 is refused",
                          choices=(0, 1, 2, 3))  # fmt: skip
    offload_optimizer_device: str | None = opt(
        None, "where DeepSpeed keeps and steps the optimizer (not set = the GPU); nvme is refused", choices=OFFLOAD_DEVICES
    )
    offload_optimizer_nvme_path: str | None = opt(None, "folder for --offload_optimizer_device=nvme (not set = none)", path=True)
    offload_param_device: str | None = opt(
        None, "of DeepSpeed's stage 3, which is refused (not set = the GPU)", choices=OFFLOAD_DEVICES
    )
    offload_param_nvme_path: str | None = opt(None, "folder for --offload_param_device=nvme (not set = none)", path=True)
    zero3_init_flag: bool = opt(False, "of DeepSpeed's stage 3, which is refused")
    zero3_save_16bit_model: bool = opt(False, "of DeepSpeed's stage 3, which is refused")
    fp16_master_weights_and_gradients: bool = opt(False, "keep DeepSpeed's copy of the weights in fp16; refused")

    @property
    def shares_optimizer(self) -> bool:
        """Whether each process has its own part of the optimizer."""
        return self.deepspeed and self.zero_stage > 0

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "ddp_timeout")
        if self.deepspeed:
            yield from self._deepspeed_problems()

    def _deepspeed_problems(self) -> Iterator[str]:
        if self.zero_stage == 3:
            yield (
                "--zero_stage=3 cannot be used: it shares weights that are trained, which of a LoRA are little, and not the "
                "frozen model, which is not DeepSpeed's: give --zero_stage=2; --fp8_base makes the model smaller"
            )
        if self.offload_optimizer_device == "nvme":
            yield (
                "--offload_optimizer_device=nvme cannot be used: DeepSpeed does that only in stage 3, which is not for a LoRA: "
                "give --offload_optimizer_device=cpu"
            )
        elif self.offload_optimizer_device is not None and self.zero_stage == 0:
            yield "--offload_optimizer_device: DeepSpeed moves no optimizer in stage 0: give --zero_stage=2, or drop the flag"
        if self.fp16_master_weights_and_gradients:
            yield (
                "--fp16_master_weights_and_gradients cannot be used: in fp16 the small steps of a LoRA are rounded away; its "
                "weights stay float32: drop the flag"
            )

    def warnings(self) -> Iterator[str]:
        given = [option.name for option in fields(self) if getattr(self, option.name) != option.default]
        if not self.deepspeed:
            yield from (f"--{name} does nothing without --deepspeed" for name in given if name in ONLY_DEEPSPEED)
            return
        yield from (f"--{name} does nothing: it is of DeepSpeed's stage 3" for name in given if name in ONLY_STAGE_3)
        if "offload_optimizer_nvme_path" in given:
            yield "--offload_optimizer_nvme_path does nothing: the optimizer is not kept on a disk"
        if self.zero_stage == 0:
            yield "--zero_stage=0 shares nothing: each process needs as much memory as without --deepspeed"
