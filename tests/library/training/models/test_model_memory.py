"""Options to arrangement: where weights are loaded to, and how blocks run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.anima.denoiser import AnimaDenoiser
from library.memory.activation_offload import OffloadingRunner
from library.memory.block_swap import SwappingRunner, big_weights
from library.nn.blocks import run_plainly
from library.nn.checkpointing import run_checkpointed
from library.nn.loading import load_into
from library.options.memory import BlockMemoryOptions, MemoryOptions
from library.training.models.model_memory import arrange_denoiser, denoiser_place
from tests.library.anima.tiny_dit import tiny_weights
from tests.library.memory.deep_dit import DEEP, deep_model, same

CPU, META = torch.device("cpu"), torch.device("meta")


def options(**memory) -> SimpleNamespace:
    return SimpleNamespace(memory=BlockMemoryOptions(**memory))


def denoiser_on_meta() -> AnimaDenoiser:
    with META:
        return AnimaDenoiser(DEEP)


@pytest.mark.parametrize("memory", [BlockMemoryOptions(), BlockMemoryOptions(blocks_to_swap=0), MemoryOptions()])
def test_all_weights_go_to_the_device_where_none_are_swapped(memory):
    assert denoiser_place(SimpleNamespace(memory=memory), denoiser_on_meta(), CPU) is CPU


def test_weights_are_loaded_to_where_they_will_be():
    """The meta device plays the GPU: big weights of streamed blocks alone are in host memory."""
    denoiser = denoiser_on_meta()
    place = denoiser_place(options(blocks_to_swap=2), denoiser, META)
    load_into(denoiser, tiny_weights(DEEP).items(), device=place, dtype=torch.float32)
    on_host = {name for name, tensor in denoiser.state_dict().items() if not tensor.is_meta}
    assert on_host == {f"blocks.{number}.{name}" for number in (0, 1, 3, 4) for name, _ in big_weights(denoiser.blocks[number])}
    assert len(on_host) == 4 * 16


@pytest.mark.parametrize(
    ("memory", "kind"),
    [
        ({}, None),
        ({"gradient_checkpointing": True}, "device"),
        ({"cpu_offload_checkpointing": True}, "cpu"),
        ({"gradient_checkpointing": True, "unsloth_offload_checkpointing": True}, "cpu_async"),
    ],
)
@pytest.mark.parametrize("blocks_to_swap", [0, 3])
def test_every_arrangement_gives_the_same_numbers(memory, kind, blocks_to_swap):
    plain, arranged = deep_model(dropout=0.2), deep_model(dropout=0.2)
    arrange_denoiser(options(**memory, blocks_to_swap=blocks_to_swap), arranged.denoiser, CPU)
    runner = arranged.denoiser.run_block
    assert isinstance(runner, SwappingRunner) == bool(blocks_to_swap)
    inner = runner._inner if blocks_to_swap else runner
    if kind in (None, "device"):
        assert inner is (run_plainly if kind is None else run_checkpointed)
    else:
        assert isinstance(inner, OffloadingRunner)
    assert arranged.denoiser.llm_adapter.run_block is (run_plainly if kind is None else run_checkpointed)
    for seed in range(2):
        assert same(plain.step(seed), arranged.step(seed))
        assert same(plain.evaluate(), arranged.evaluate())


def test_a_denoiser_that_is_called_another_way_already_keeps_it():
    calls = []

    def compiled(number, block, x, *inputs):
        calls.append(number)
        return block(x, *inputs)

    model = deep_model()
    model.denoiser.run_block = compiled
    arrange_denoiser(options(blocks_to_swap=4), model.denoiser, CPU)
    model.evaluate()
    assert calls == [0, 1, 2, 3, 4, 5]
