"""Rules of a run that ask for more than its options: what is installed, an optimizer's class, the number of processes.

Nothing here imports torch, nor the packages it looks for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from library.errors import OptionError
from library.nn.attention_packages import PACKAGES
from library.options.optimizer import OptimizerOptions
from library.training.optimizing.optimizer_names import FINDS_STEP_SIZE, optimizer_kind, optimizer_source
from library.training.optimizing.schedule_names import step_count

if TYPE_CHECKING:
    from library.options.attention import AttentionOptions
    from library.options.schedule import ScheduleOptions

OLDEST_DEEPSPEED = (0, 19)  # from here on it skips a step whose float32 gradient is not finite
# optimizers that treat each number by itself (8-bit ones: with its neighbours, which are rounded together): of a long row of
# numbers, which is what DeepSpeed hands them, they make the same
BY_NUMBER = {
    "torch.optim": ("Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    "lion_pytorch": ("Lion",),
    "bitsandbytes.optim": tuple(
        f"{paged}{kind}{bits}"
        for paged in ("", "Paged")
        for kind in ("Adam", "AdamW", "Lion", "SGD")
        for bits in ("", "8bit", "32bit")
    ),
}
ON_GPU_ONLY = ("bitsandbytes",)


def run_problems(options: Any) -> Iterator[str]:
    """All problems of a training run that this file knows. ``options``: an architecture's option set."""
    yield from attention_problems(options.attention)
    if options.memory.fused_backward_pass:
        yield from fused_backward_problems(options.optimizer, processes=int(os.environ.get("WORLD_SIZE", "1")))
    yield from deepspeed_problems(options) if options.distributed.deepspeed else launcher_problems()


def run_warnings(options: Any, *, total_steps: int) -> Iterator[str]:
    """What is allowed but probably not meant, where the optimizer's class and the run's length tell."""
    kind = optimizer_kind(options.optimizer)
    if kind != "adafactor_relative" and optimizer_source(options.optimizer).package not in FINDS_STEP_SIZE:
        yield from rate_warnings(options)
    if kind == "plain" and not options.schedule.lr_scheduler_type:
        yield from warmup_warnings(options.schedule, total_steps=total_steps)


def rate_warnings(options: Any) -> Iterator[str]:
    """--learning_rate, or the flag of a part, is not given, so that a part is trained at the rate that whole models take."""
    low = OptimizerOptions().learning_rate
    if options.optimizer.learning_rate != low:
        return
    parts = [
        *(["the denoiser"] if options.trains_denoiser and options.denoiser_rate == low else []),
        *([f"the text encoder{'s' if options.TEXT_ENCODERS > 1 else ''}"] if low in options.text_rates else []),
    ]
    if parts:
        named = " and ".join(parts)
        verb = "are" if parts[1:] or named.endswith("s") else "is"
        yield (
            f"--learning_rate is {low:g}, as in kohya-ss/sd-scripts where none is given: {named} {verb} trained at it, and a "
            "LoRA learns next to nothing; it often takes 1e-4"
        )


def warmup_warnings(schedule: ScheduleOptions, *, total_steps: int) -> Iterator[str]:
    """The run ends while its rate still rises."""
    if schedule.lr_warmup_steps and step_count(schedule.lr_warmup_steps, total_steps) >= total_steps:
        yield (
            f"--lr_warmup_steps is {schedule.lr_warmup_steps}, and the run has {total_steps} steps: the learning rate rises to "
            "the very end and is never as high as given; a tenth of the run (0.1) is usual"
        )


def attention_problems(options: AttentionOptions) -> Iterator[str]:
    """The package of the kernel that ``options`` name is not installed."""
    package = PACKAGES.get(options.mode)
    if package is None or find_spec(package.top_module) is not None:
        return
    if options.flag == "--xformers":
        yield (
            f"--xformers needs the package {package.top_module}, which is not installed: drop it (PyTorch's own attention, the "
            f"default, takes as little memory), or pip install {package.name}"
        )
        return
    cure = "give --attn_mode=torch, which" if options.attn_mode else "drop it: PyTorch's own attention, the default,"
    yield (
        f"{options.flag} needs the package {package.top_module}, which is not installed: pip install {package.name}, "
        f"or {cure} needs nothing"
    )


def fused_backward_problems(options: OptimizerOptions, *, processes: int) -> Iterator[str]:
    """--fused_backward_pass changes each weight by itself, as soon as its gradient is there."""
    if processes > 1:
        yield (
            f"--fused_backward_pass works with one process, not {processes}: gradients are used before they could be summed over "
            "processes; drop it, or start one process"
        )
    try:
        source, kind = optimizer_source(options), optimizer_kind(options)
    except OptionError:
        return  # optimizer_problems tells that
    if source.package in FINDS_STEP_SIZE:
        yield (
            f"--fused_backward_pass cannot be used with {source.class_name}, which finds one step size from the gradients of all "
            "weights together: drop it, or give another --optimizer_type"
        )
    elif kind == "schedule_free":
        yield (
            f"--fused_backward_pass cannot be used with {source.class_name}, which averages all weights together, once a step: "
            "drop it, or give another --optimizer_type"
        )


def deepspeed_problems(options: Any) -> Iterator[str]:
    """--deepspeed on this machine, and beside other flags."""
    yield from deepspeed_package_problems()
    if options.memory.fused_backward_pass:
        yield "--fused_backward_pass cannot be used with --deepspeed, which sums all gradients before a weight changes: drop one"
    for flag in ("full_bf16", "full_fp16"):
        if getattr(options.run, flag):
            yield f"--{flag} cannot be used with --deepspeed, which keeps what is trained in float32: drop one"
    if options.distributed.shares_optimizer:
        yield from shared_optimizer_problems(options.optimizer, on_cpu=options.distributed.offload_optimizer_device is not None)
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        file = os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
        yield (
            f"accelerate is configured with DeepSpeed's file {file}, which is not read: give --zero_stage and the other flags "
            "instead, and leave the file out of accelerate config"
        )


def deepspeed_package_problems() -> Iterator[str]:
    instead = "without --deepspeed, accelerate launch --multi_gpu trains on several GPUs"
    if sys.platform == "win32":
        yield f"--deepspeed needs the package deepspeed, which does not train on Windows: drop the flag; {instead}"
        return
    try:
        found = version("deepspeed") if find_spec("deepspeed") is not None else None
    except PackageNotFoundError:
        return  # a copy without an entry in pip's list: of any age
    if found is None:
        yield f"--deepspeed needs the package deepspeed, which is not installed: pip install deepspeed; {instead}"
    elif _release(found) < OLDEST_DEEPSPEED:
        oldest = ".".join(map(str, OLDEST_DEEPSPEED))
        yield f"--deepspeed needs deepspeed {oldest} or newer, and {found} is installed: pip install --upgrade deepspeed"


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def shared_optimizer_problems(options: OptimizerOptions, *, on_cpu: bool) -> Iterator[str]:
    """Each process steps for its part of the weights, which lie in one row without their shapes."""
    try:
        source = optimizer_source(options)
    except OptionError:
        return  # optimizer_problems tells that
    if source.class_name not in BY_NUMBER.get(source.module, ()):
        yield (
            f"--deepspeed cannot share {source.path} among processes: its steps may depend on how weights lie together or "
            "on their shapes; give --optimizer_type=AdamW or another one that treats each number by itself, or --zero_stage=0, "
            "which shares nothing"
        )
    elif on_cpu and source.package in ON_GPU_ONLY:
        yield f"--offload_optimizer_device: {source.path} works on the GPU only: drop one, or give --optimizer_type=AdamW"


def launcher_problems() -> Iterator[str]:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        yield (
            "accelerate is configured for DeepSpeed: add --deepspeed (and --zero_stage and the like, which count here instead of "
            "accelerate's), or choose plain multi-GPU training in accelerate config"
        )
