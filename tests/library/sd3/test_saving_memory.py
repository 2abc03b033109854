"""Checkpointing, offloading, block swap and compiling of MMDiTs, whose blocks are of two or three forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.memory.activation_offload import OffloadingRunner
from library.memory.block_swap import BlockSwap, SwappingRunner
from library.memory.transfer import PlainTransfer
from library.nn.blocks import run_plainly
from library.nn.checkpointing import run_checkpointed
from library.nn.compiling import compile_blocks
from library.sd3.denoiser import Mmdit
from networks import lora_sd3
from tests.library.memory.late_transfer import LateTransfer
from tests.library.sd3.tiny_mmdit import TINY, batch, tiny_denoiser

DEEP = replace(TINY, blocks=6, dual_blocks=(0, 1, 2))
RUNNERS = {
    "plain": lambda: run_plainly,
    "checkpointed": lambda: run_checkpointed,
    "offloaded": lambda: OffloadingRunner(PlainTransfer(), ahead=False),
    "offloaded ahead": lambda: OffloadingRunner(LateTransfer(), ahead=True),
}


def with_lora() -> tuple[Mmdit, list[Tensor]]:
    """A denoiser and the trained weights of a LoRA that acts."""
    denoiser = tiny_denoiser(DEEP)
    torch.manual_seed(0)
    network = lora_sd3.create_network(1.0, 4, 4.0, None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    for lora in network.unet_loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.1)
    return denoiser, [weight for weight in network.parameters() if weight.requires_grad]


def step(denoiser: Mmdit, trained: list[Tensor]) -> list[Tensor]:
    """The velocity and, where they have any, the gradients of a step and of another one, of another size and number."""
    found = []
    latents, *others = batch(DEEP, height=4, width=10)
    for inputs in (batch(DEEP), [latents[:1], *(tensor[:1] for tensor in others)]):
        velocity = denoiser(*inputs)
        gradients = torch.autograd.grad(velocity.square().mean(), trained, allow_unused=True)
        found += [velocity.detach(), *(gradient for gradient in gradients if gradient is not None)]
    return found


@pytest.mark.parametrize("blocks_to_swap", [0, 4])
@pytest.mark.parametrize("runner", RUNNERS)
def test_velocity_and_gradients_are_those_without(runner, blocks_to_swap):
    expected = step(*with_lora())
    denoiser, trained = with_lora()
    denoiser.run_block = RUNNERS[runner]()
    if blocks_to_swap:
        swap = BlockSwap(denoiser.blocks, blocks_to_swap, device=torch.device("cpu"), transfer=LateTransfer())
        denoiser.run_block = SwappingRunner(swap, denoiser.run_block)
    found = step(denoiser, trained)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_graph_for_each_form_of_block_serves_all_sizes():
    """There are three: with a second attention, without, and the last."""
    torch.compiler.reset()  # what other tests compiled counts too
    compiled = []
    config = replace(TINY, dual_blocks=(0,))
    denoiser = tiny_denoiser(config)
    compile_blocks(denoiser, lambda graph, inputs: compiled.append(graph) or graph.forward, fullgraph=True)
    expected = tiny_denoiser(config)
    for height, width in ((8, 6), (4, 10), (16, 16)):
        inputs = batch(config, height=height, width=width)
        with torch.no_grad():
            torch.testing.assert_close(denoiser(*inputs), expected(*inputs), rtol=1e-4, atol=1e-5)
        assert len(compiled) == config.blocks
