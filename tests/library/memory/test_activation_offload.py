"""Inputs of blocks that wait in host memory: the same losses and gradients, and less memory on the device."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from library.memory.activation_offload import OffloadingRunner
from library.memory.transfer import PlainTransfer, transfer_for
from tests.library.memory.deep_dit import Model, deep_model, same
from tests.library.memory.late_transfer import CountingTransfer, LateTransfer

RUNNERS = {
    "at once": lambda: OffloadingRunner(PlainTransfer(), ahead=False),
    "ahead": lambda: OffloadingRunner(LateTransfer(), ahead=True),
    "late": lambda: OffloadingRunner(LateTransfer(), ahead=False),
}


def offloading(model: Model, runner: OffloadingRunner) -> Model:
    model.denoiser.run_block = runner
    return model


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("runner", RUNNERS)
def test_losses_and_gradients_are_those_without(runner, dropout):
    plain, offloaded = deep_model(dropout=dropout), offloading(deep_model(dropout=dropout), RUNNERS[runner]())
    for seed in range(2):
        assert same(plain.step(seed), offloaded.step(seed))
        assert same(plain.evaluate(), offloaded.evaluate())


@pytest.mark.parametrize("runner", RUNNERS)
def test_passes_in_any_order(runner):
    """Several forwards before a backward, passes without gradients in between, a graph that is run backward twice."""

    def mixed(model: Model) -> list[torch.Tensor]:
        weights = list(model.network.parameters())
        first, second = model.forward(), model.forward() * 0.5
        (base,) = model.evaluate()
        loss = (first + second - base).square().mean()
        kept = torch.autograd.grad(loss, weights, retain_graph=True)
        return [*kept, *model.evaluate(), *torch.autograd.grad(loss, weights), *model.step()]

    assert same(mixed(deep_model()), mixed(offloading(deep_model(), RUNNERS[runner]())))


@pytest.mark.parametrize("runner", RUNNERS)
def test_after_a_forward_pass_that_fails(runner):
    plain, offloaded = deep_model(), offloading(deep_model(), RUNNERS[runner]())

    def stop(*_):
        raise ArithmeticError

    hook = offloaded.denoiser.blocks[3].register_forward_pre_hook(stop)
    with pytest.raises(ArithmeticError):
        offloaded.step()
    hook.remove()
    assert same(plain.step(), offloaded.step())


def test_every_input_crosses_once_there_and_once_back():
    model, transfer = deep_model(), CountingTransfer()
    offloading(model, OffloadingRunner(transfer, ahead=True)).step()
    blocks, x_bytes = len(model.denoiser.blocks), 2 * 12 * model.denoiser.config.width * 4  # (B, N, D) in float32
    assert transfer.copies == 2 * blocks
    assert transfer.nbytes == 2 * blocks * x_bytes
    model.evaluate()
    assert transfer.copies == 2 * blocks


def run_through(runner: OffloadingRunner, block, blocks: int = 6) -> torch.Tensor:
    x = torch.randn(2, 4)
    for number in range(blocks):
        x = runner(number, block, x)
    return x.square().sum()


@pytest.mark.parametrize("ahead", [False, True])
def test_one_input_is_on_the_device_at_a_time(ahead):
    """And after the forward pass that of the last block, whose backward is next."""
    inputs: list[weakref.ref] = []
    alive: list[int] = []
    layer = nn.Linear(4, 4)

    def block(x):
        inputs.append(weakref.ref(x))
        alive.append(count(inputs))
        return layer(x)

    loss = run_through(OffloadingRunner(LateTransfer(), ahead=ahead), block)
    assert alive == [1] * 6 and count(inputs) == 1
    del alive[:]
    loss.backward()
    assert alive == [1] * 6 and count(inputs) == 0


def count(references: list[weakref.ref]) -> int:
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize(("ahead", "coming"), [(False, [0, 0, 0, 0, 0, 0]), (True, [1, 1, 1, 1, 1, 0])])
def test_the_input_of_the_block_before_is_on_its_way_while_a_block_is_computed_again(ahead, coming):
    transfer, layer = LateTransfer(), nn.Linear(4, 4)
    seen: list[int] = []

    def block(x):
        seen.append(len(transfer.waiting))
        return layer(x)

    loss = run_through(OffloadingRunner(transfer, ahead=ahead), block)
    del seen[:]
    loss.backward()
    assert seen == coming


def test_nothing_is_kept_without_gradients_or_after_the_graph_is_gone():
    held: list[weakref.ref] = []

    class Watched(PlainTransfer):
        def host_memory(self, nbytes):
            memory = super().host_memory(nbytes)
            held.append(weakref.ref(memory.untyped_storage()))
            return memory

    model = offloading(deep_model(), OffloadingRunner(Watched(), ahead=True))
    model.evaluate()
    assert not held
    model.step()
    gc.collect()
    assert len(held) == 6 and not any(ref() is not None for ref in held)


def test_the_gradient_of_what_enters_the_first_block():
    x = torch.randn(3, 4, requires_grad=True)
    block = nn.Linear(4, 4)
    runner = OffloadingRunner(LateTransfer(), ahead=True)
    offloaded = runner(1, block, runner(0, block, x)).square().sum()
    plain = block(block(x)).square().sum()
    assert torch.equal(torch.autograd.grad(offloaded, x)[0], torch.autograd.grad(plain, x)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ahead", [False, True])
def test_on_the_gpu(ahead):
    device = torch.device("cuda")
    plain = deep_model(device="cuda", dropout=0.2)
    transfer = transfer_for(device) if ahead else PlainTransfer()
    offloaded = offloading(deep_model(device="cuda", dropout=0.2), OffloadingRunner(transfer, ahead=ahead))
    for seed in range(5):
        assert same(plain.step(seed), offloaded.step(seed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_is_repeated_on_the_gpu_where_a_block_has_no_other_input():
    block = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).cuda()
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    found = []
    for run_block in (lambda number, block, x: block(x), OffloadingRunner(transfer_for(x.device), ahead=True)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(run_block(0, block, x).square().sum(), x)[0])
    assert torch.equal(*found)
