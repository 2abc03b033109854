"""What a LoRA on all default modules costs in the denoisers of Stable Diffusion 3 and Lumina Image 2.0; Anima's is in lora.py.

The LoRAs are on the layers of text, image and noise level alike. So the step without them makes the gradients of latents, noise
level and text: those for which backward goes through all layers, modulations too.
"""

from __future__ import annotations

import torch

from library.lumina.denoiser import NextDit
from library.lumina.layout import NextDitConfig
from library.sd3.denoiser import Mmdit
from library.sd3.layout import MmditConfig
from networks import lora_lumina, lora_sd3
from tools.bench_parts.figures import Figure
from tools.bench_parts.lora import Inputs, cost_of_lora, twins_of

MMDIT = MmditConfig(width=1024, blocks=4, heads=16, mlp_hidden=4096, position_side=64)
NEXT_DIT = NextDitConfig(width=1024, blocks=4, context_refiners=1, noise_refiners=1, heads=16, kv_heads=4, head_dim=64,
                         mlp_hidden=4096, context_width=1024, axes_dims=(16, 24, 24))  # fmt: skip
SD3_TOKENS, LUMINA_TOKENS = 77 + 256, 128  # of a caption: CLIP's and T5's; a usual one of Gemma's


def measure(repeats: int, *, mmdit: MmditConfig = MMDIT, next_dit: NextDitConfig = NEXT_DIT, side: int = 64,
            rank: int = 16) -> list[Figure]:  # fmt: skip
    """``side``: latent rows and columns; 64 are 1024 image tokens. Float32 on the CPU, batch of one."""
    sd3 = cost_of_lora(
        repeats, twins_of(lambda: Mmdit(mmdit)), sd3_inputs(mmdit, side), rank=rank, network=lora_sd3, name="SD3: ", of_all=True
    )
    lumina = cost_of_lora(repeats, twins_of(lambda: NextDit(next_dit)), lumina_inputs(next_dit, side), rank=rank,
                          network=lora_lumina, name="Lumina: ", of_all=True)  # fmt: skip
    return [sd3, lumina]


def sd3_inputs(config: MmditConfig, side: int) -> Inputs:
    """latents, timesteps, context, pooled"""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, side, side, generator=generator)
    context = torch.randn(1, SD3_TOKENS, config.context_width, generator=generator)
    return latents, torch.tensor([500.0]), context, torch.randn(1, config.pooled_width, generator=generator)


def lumina_inputs(config: NextDitConfig, side: int) -> Inputs:
    """latents, times, states, lengths"""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, side, side, generator=generator)
    states = torch.randn(1, LUMINA_TOKENS, config.context_width, generator=generator)
    return latents, torch.tensor([0.5]), states, [LUMINA_TOKENS]
