from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.anima.denoiser import AnimaDenoiser
from library.anima.memory_use import kept_values
from networks import lora_anima
from tests.library.anima.tiny_dit import TINY

CONFIG = replace(TINY, width=192, heads=3, head_dim=64, mlp_hidden=768, context_dim=64, adaln_dim=16, adapter=None)


def kept_bytes(blocks: int, latent_hw: tuple[int, int]) -> int:
    """What autograd really keeps of a forward pass, weights left out."""
    denoiser = AnimaDenoiser(replace(CONFIG, blocks=blocks)).to(torch.bfloat16).requires_grad_(False)
    network = lora_anima.create_network(1.0, 4, 4, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    weights = {p.untyped_storage().data_ptr() for p in (*denoiser.parameters(), *network.parameters())}
    kept: dict[int, torch.Tensor] = {}  # by place in memory; holding the tensors keeps places apart

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        denoiser(torch.randn(1, 16, *latent_hw), torch.tensor([0.5]), torch.randn(1, 8, 64, dtype=torch.bfloat16))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("latent_hw", [(64, 64), (48, 96)])
def test_what_a_block_keeps_is_what_is_said(latent_hw):
    tokens = latent_hw[0] * latent_hw[1] // 4
    of_one_block = kept_bytes(3, latent_hw) - kept_bytes(2, latent_hw)
    assert of_one_block / 2 == pytest.approx(kept_values(CONFIG, tokens), rel=0.06)
