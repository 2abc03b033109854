"""Rules of a run that ask for more than its options: what is installed, an optimizer's class, the number of processes.

Nothing here imports torch, nor the packages it looks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from library.errors import OptionError
from library.nn.attention_packages import PACKAGES
from library.training.optimizing.optimizer_names import FINDS_STEP_SIZE, optimizer_kind, optimizer_source

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions


def run_problems(options: Any) -> Iterator[str]:
    """All problems of a training run that this file knows. ``options``: an architecture's option set."""
    yield from attention_problems(options.attention.mode)
    if options.memory.fused_backward_pass:
        yield from fused_backward_problems(options.optimizer, processes=int(os.environ.get("WORLD_SIZE", "1")))


def attention_problems(mode: str) -> Iterator[str]:
    """The kernel of ``mode`` (as ``AttentionOptions.mode`` gives it) cannot be had here."""
    package = PACKAGES.get(mode)
    if package is not None and find_spec(package.top_module) is None:
        yield (
            f"--attn_mode={mode} needs the package {package.top_module}, which is not installed: pip install {package.name}, "
            "or give --attn_mode=torch, which needs nothing"
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
