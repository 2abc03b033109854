"""Compiled blocks, with weights that come and go and inputs that wait elsewhere: the same numbers from the same graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from library.memory.activation_offload import OffloadingRunner
from library.memory.block_swap import BlockSwap, SwappingRunner
from library.nn.blocks import BlockRunner
from library.nn.checkpointing import run_checkpointed
from library.nn.compiling import compile_blocks
from tests.library.memory.deep_dit import DEEP, deep_model, same
from tests.library.memory.late_transfer import LateTransfer


@pytest.mark.slow  # compiling takes its time
@pytest.mark.parametrize(
    "inner", [run_checkpointed, OffloadingRunner(LateTransfer(), ahead=True)], ids=["checkpointed", "offloaded"]
)
def test_swapping_compiled_blocks(inner):
    plain, plain_graphs = compiled_run(None)
    swapped, graphs = compiled_run(inner)
    assert same(plain, swapped)
    assert graphs == plain_graphs == 2  # with gradients and without


def compiled_run(inner: BlockRunner | None) -> tuple[list[torch.Tensor], int]:
    """Outcome of two steps with dropout and two passes without gradients, and how many graphs they took."""
    torch._dynamo.reset()
    counters.clear()
    model = deep_model(dropout=0.2)
    compile_blocks(model.denoiser, "aot_eager", fullgraph=True)
    if inner is not None:
        ring = BlockSwap(model.denoiser.blocks, DEEP.blocks - 2, device=torch.device("cpu"), transfer=LateTransfer())
        model.denoiser.run_block = SwappingRunner(ring, inner)
    found = [*model.step(), *model.evaluate(), *model.step(1), *model.evaluate()]
    return found, counters["stats"]["unique_graphs"]
