"""A training step of the real-size DiTs of Stable Diffusion 3 and 3.5 and of Lumina Image 2.0 on the GPU.

What is measured, and how, is that of gpu.py: 1024x1024 pixels, one image, a LoRA of rank 16 on all default modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.lumina import checkpoint as lumina_checkpoint
from library.lumina import fp8_layers as lumina_fp8_layers
from library.lumina.denoiser import NextDit
from library.lumina.layout import NextDitConfig
from library.sd3 import checkpoint as sd3_checkpoint
from library.sd3 import fp8_layers as sd3_fp8_layers
from library.sd3.denoiser import Mmdit
from library.sd3.layout import MmditConfig
from networks import lora_lumina, lora_sd3
from tools.bench_parts import gpu
from tools.bench_parts.figures import Figure
from tools.bench_parts.gpu import CHECKPOINTING, Case, Subject
from tools.bench_parts.lora_dit import lumina_inputs, sd3_inputs

# ---------------------------------------------------------------- sizes as published, and inputs

MEDIUM = MmditConfig()
MEDIUM_35 = MmditConfig(position_side=384, qk_norm=True, dual_blocks=tuple(range(13)))
LARGE_35 = MmditConfig(width=2432, blocks=38, heads=38, mlp_hidden=9728, qk_norm=True)


def mmdit_predictor(denoiser: Mmdit, case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    _, timesteps, context, pooled = (given.to(device) for given in sd3_inputs(denoiser.config, side=1))
    return lambda latents: denoiser(latents, timesteps, context, pooled)


def nextdit_predictor(denoiser: NextDit, case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    _, times, states, lengths = lumina_inputs(denoiser.config, side=1)
    times, states = times.to(device), states.to(device)
    return lambda latents: denoiser(latents, times, states, lengths)


# ---------------------------------------------------------------- the ways to run them


def cases(blocks: int) -> tuple[Case, ...]:
    """Of a model with so many blocks that may be swapped."""
    half, most = blocks // 2, blocks - 2
    return (
        Case(name="eager"),
        Case(name="compiled", compiled=True),
        Case(name="checkpointing", memory=CHECKPOINTING),
        Case(name="cpu offload", memory={"cpu_offload_checkpointing": True}),
        Case(name="unsloth offload", memory={"unsloth_offload_checkpointing": True}),
        Case(name=f"swap {half}", memory={"blocks_to_swap": half}),
        Case(name=f"swap {most}, unsloth offload", memory={"blocks_to_swap": most, "unsloth_offload_checkpointing": True}),
        Case(name="fp8", fp8=True),
        Case(name="checkpointing, fp8", memory=CHECKPOINTING, fp8=True),
        # from here on what may go wrong, and leave the device unusable
        Case(name="step recorded by the benchmark", recorded=True),
        Case(name="compiled, step recorded by the benchmark", compiled=True, recorded=True),
    )


def mmdit_subject(label: str, config: MmditConfig) -> Subject:
    return Subject(
        label=label,
        config=config,
        cases=cases(config.blocks),
        build=sd3_checkpoint.build_denoiser,
        predictor=mmdit_predictor,
        create_network=lora_sd3.create_network,
        fp8_layers=sd3_fp8_layers.DENOISER_FP8_LAYERS,
    )


SUBJECTS: tuple[Subject, ...] = (
    mmdit_subject("SD3-medium ", MEDIUM),
    mmdit_subject("SD3.5-medium ", MEDIUM_35),
    mmdit_subject("SD3.5-large ", LARGE_35),
    Subject(
        label="Lumina ",
        config=NextDitConfig(),
        cases=cases(NextDitConfig().blocks),
        build=lumina_checkpoint.build_denoiser,
        predictor=nextdit_predictor,
        create_network=lora_lumina.create_network,
        fp8_layers=lumina_fp8_layers.DENOISER_FP8_LAYERS,
    ),
)


def measure(repeats: int, *, subjects: tuple[Subject, ...] = SUBJECTS, **where: Any) -> list[Figure]:
    """``where``: as of ``gpu.measure``."""
    return gpu.measure(repeats, subjects=subjects, **where)
