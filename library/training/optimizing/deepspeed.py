"""--deepspeed: DeepSpeed's engine owns what is trained, and the processes share the optimizer's memory among them (ZeRO).

The frozen models are not in its hands. Gradients of all micro-batches are collected here first and handed to the engine once for
each update, every weight in the same order: it sums them over processes in buckets whose content is decided by the order in which
weights report, which differs between processes where a batch or a module drops out of one of them. Then the engine sums, clips
and steps. An update whose loss or gradient is not finite is skipped whole: neither weights nor moments change.

Weights stay float32, as they do without DeepSpeed; so the engine's own copy of them is the same bit by bit. It asks the host
whether a gradient is finite, so each step waits for the device once.

The package is imported when a run starts to use it, never before.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.errors import CheckpointError
from library.training.optimizing.learner import Learner
from library.training.optimizing.optimizers import optimizer_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options.train import TrainOptions
    from library.training.running.processes import HostGroup

# the loss scale of fp16: what torch.amp.GradScaler begins with and does
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000
LARGEST_BUCKET = 5_000_000  # numbers summed over processes at once; the engine holds a buffer of this size


class DeepSpeedLearner(Learner):
    """A Learner whose gradients are summed, clipped and applied by DeepSpeed's engine."""

    def __init__(self, network: Any, accelerator: Accelerator, options: TrainOptions, *,
                 groups: tuple[list[dict[str, Any]], list[str]], total_steps: int):  # fmt: skip
        super().__init__(network, accelerator, options, groups=trainable(groups), total_steps=total_steps)

    def _prepare(self, options: TrainOptions) -> None:
        self._scale = LossScale() if self.scales_losses else None
        self._sums: list[Tensor] | None = None  # this update's gradient so far, for each weight
        self._processes, self._rank = self._accelerator.num_processes, self._accelerator.process_index
        count = sum(weight.numel() for weight in self._trained)
        config = engine_config(options, processes=self._processes, weights=count)
        self._engine = start_engine(self.network, self._optimizer, config, device=self._accelerator.device)

    @property
    def can_save_alone(self) -> bool:
        """Not where each process has its own part of the optimizer."""
        return self._processes == 1 or not self._is_shared

    @property
    def _is_shared(self) -> bool:
        """Each process has its part of the optimizer, and its own float32 copy of that part's weights (stages 1 and 2)."""
        return hasattr(self._engine.optimizer, "refresh_fp32_params")

    def backward(self, step: int, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch; the engine knows nothing of it yet."""
        scaled = loss if self._scale is None else loss * self._scale.value
        found = torch.autograd.grad(scaled, self._trained, allow_unused=True)  # past the engine's hooks, which .backward() calls
        if self._sums is None:
            pairs = zip(found, self._trained, strict=True)
            self._sums = [torch.zeros_like(weight) if gradient is None else gradient for gradient, weight in pairs]
            return
        for total, gradient in zip(self._sums, found, strict=True):
            if gradient is not None:
                total += gradient

    def sum_gradients(self) -> None:
        """The engine does that, in step()."""

    def _change_weights(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        self._hand_over_gradients(loss)
        self.weights.remember(step)
        norm, finite = self._step_engine()
        if self._scale is not None:
            self._scale.update(finite=finite)
        device = self._accelerator.device
        return torch.as_tensor(norm, dtype=torch.float32, device=device), torch.full((), finite, device=device)

    def _hand_over_gradients(self, loss: Tensor) -> None:
        """The engine's backward pass, which sums over processes: of a function of the weights that has the collected gradient.

        A loss that is not finite makes the whole gradient NaN, so that all processes skip the step, whatever the gradient was.
        """
        sums = self._sums if self._sums is not None else [torch.zeros_like(weight) for weight in self._trained]
        self._sums = None
        factor = self._processes / (1.0 if self._scale is None else self._scale.value)  # the engine takes the mean
        upstream = torch.where(torch.isfinite(loss.detach()), factor, torch.nan)
        parts = [(weight * gradient).sum() for weight, gradient in zip(self._trained, sums, strict=True)]
        self._engine.backward(torch.stack(parts).sum() * upstream)

    def _step_engine(self) -> tuple[Tensor | float, bool]:
        """Returns the gradient's 2-norm before clipping, and whether it was finite; else nothing has changed."""
        if self._is_shared:
            self._engine.step()
            return self._engine.get_global_grad_norm(), not self._engine.optimizer.overflow
        gradients = [weight.grad for weight in self._trained if weight.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        finite = bool(torch.isfinite(norm))
        if finite:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm, finite

    def _keep_max_norm(self) -> list[Tensor]:
        numbers = super()._keep_max_norm()
        if self._max_weight_norm:
            self._tell_engine_weights()
        return numbers

    def _tell_engine_weights(self) -> None:
        """Weights were changed past the engine, in all processes alike."""
        if self._is_shared:
            self._engine.optimizer.refresh_fp32_params()

    def state(self) -> dict[str, Any]:
        """Of this process: its part of the optimizer where that is shared."""
        return {
            "optimizer": optimizer_state(self._optimizer),
            "schedule": self._schedule.state_dict(),
            "scaler": None if self._scale is None else self._scale.state(),
        }

    def gathered_state(self, group: HostGroup) -> dict[str, Any]:
        if not self._is_shared:
            return self.state()
        from library.files.torch_file import torch_bytes

        state = self.state()
        parts = group.gather(bytes(torch_bytes(state["optimizer"])))  # as bytes: what is on the GPU comes back on the CPU
        return {**state, "optimizer": {"parts": [_loaded(part) for part in parts]}}

    def load_state(self, training: dict[str, Any], network: dict[str, Tensor]) -> None:
        optimizer = training["optimizer"]
        if self._is_shared:
            parts = optimizer.get("parts", [])
            if len(parts) != self._processes:
                raise CheckpointError(
                    f"the state has the optimizer in {len(parts)} parts, one for each process that shared it with --deepspeed, "
                    f"but this run has {self._processes}: start as many, or start a new run with --network_weights"
                )
            optimizer = parts[self._rank]
        super().load_state({**training, "optimizer": optimizer}, network)
        self._tell_engine_weights()

    def _load_scale(self, saved: dict[str, Any]) -> None:
        if self._scale is not None and "value" in saved:  # a run without DeepSpeed had another search
            self._scale.load(saved)


def trainable(groups: tuple[list[dict[str, Any]], list[str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """``groups`` without weights that are not trained, and without groups that are empty then: the engine leaves those out too,
    but schedule and rates would not hear of it."""
    found = [({**group, "params": [p for p in group["params"] if p.requires_grad]}, name)
             for group, name in zip(*groups, strict=True)]  # fmt: skip
    filled = [(group, name) for group, name in found if group["params"]]
    return [group for group, _ in filled], [name for _, name in filled]


class LossScale:
    """What the loss is multiplied by in fp16, so that small gradients do not vanish: halved when they overflow, doubled after
    many steps in which they did not. A number of the host, which hears of every step's overflow anyway."""

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._good_steps = 0

    def update(self, *, finite: bool) -> None:
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.value *= BACKOFF
        elif self._good_steps == GROWTH_STEPS:
            self.value *= GROWTH
            self._good_steps = 0

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self._good_steps}

    def load(self, saved: dict[str, float]) -> None:
        self.value, self._good_steps = saved["value"], int(saved["good_steps"])


def engine_config(options: TrainOptions, *, processes: int, weights: int) -> dict[str, Any]:
    """DeepSpeed's configuration, which accelerate makes of the flags. ``weights``: how many numbers are trained."""
    from accelerate.utils import DeepSpeedPlugin

    flags = options.distributed
    plugin = DeepSpeedPlugin(
        zero_stage=flags.zero_stage,
        gradient_accumulation_steps=1,  # the engine gets one gradient for each update
        gradient_clipping=options.optimizer.max_grad_norm,
        offload_optimizer_device=flags.offload_optimizer_device or "none",
        offload_optimizer_nvme_path="none",
        offload_param_device="none",
        offload_param_nvme_path="none",
        zero3_init_flag=False,
        zero3_save_16bit_model=False,
    )
    config: dict[str, Any] = plugin.deepspeed_config
    bucket = max(1, min(weights, LARGEST_BUCKET))
    config["zero_optimization"].update(reduce_bucket_size=bucket, allgather_bucket_size=bucket)
    images = options.dataset.train_batch_size
    return {
        **config,
        "train_micro_batch_size_per_gpu": images,
        "train_batch_size": images * processes,
        "bf16": {"enabled": False},  # autocast is the trainer's
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,  # library/training/run_rules.py tells which ones fit
        "zero_force_ds_cpu_optimizer": False,  # the run's own optimizer, not one that is compiled when training starts
    }


def start_engine(network: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], *, device: torch.device) -> Any:
    """The engine over ``network``, whose weights it lays out anew in memory; ``optimizer`` has this process's part afterwards."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU that the run leaves alone
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _launched(device):
        return deepspeed.initialize(model=network, optimizer=optimizer, config=config, dist_init_required=False)[0]


@contextmanager
def _launched(device: torch.device) -> Iterator[None]:
    """DeepSpeed wants a process group and a launcher's word, even of one process that was started without any."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    told = "LOCAL_RANK" in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if not told:
            del os.environ["LOCAL_RANK"]


def _loaded(part: bytes) -> Any:
    return torch.load(io.BytesIO(part), map_location="cpu", weights_only=True)
