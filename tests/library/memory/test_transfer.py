from __future__ import annotations

import logging

import pytest
import torch

from library.memory.transfer import CudaTransfer, PlainTransfer, transfer_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_plain_copy_is_done_when_it_is_started():
    transfer = transfer_for(CPU)
    assert isinstance(transfer, PlainTransfer)
    source = torch.arange(12, dtype=torch.uint8)
    target = transfer.host_memory(12)
    copy = transfer.start(target, source)
    assert torch.equal(target, source)
    transfer.wait(copy)


def test_a_source_that_asks_for_gradients_is_copied_without():
    source = torch.randn(3, requires_grad=True)
    target = torch.empty(3)
    PlainTransfer().start(target, source * 1)
    assert torch.equal(target, source) and not target.requires_grad


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch, caplog):
    """The system's limit; told once."""

    def refuse(*shape, pin_memory=False, **how):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return empty(*shape, **how)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", refuse)
    transfer = object.__new__(CudaTransfer)  # without a GPU there is no stream
    transfer._can_pin = True
    with caplog.at_level(logging.WARNING):
        assert transfer.host_memory(8).nbytes == transfer.host_memory(16).nbytes // 2 == 8
    assert [record.getMessage().count("(CUDA error: out of memory)") for record in caplog.records] == [1]


@pytest.mark.gpu
@needs_gpu
def test_a_copy_comes_after_what_is_queued_and_before_what_waits_for_it():
    """The queue is filled with work, so that whatever does not keep the order is overtaken."""
    transfer = transfer_for(CUDA)
    matrix = torch.randn(4096, 4096, device="cuda")
    host = transfer.host_memory(4096 * 4096 * 4).view(torch.float32).view(4096, 4096)
    assert host.is_pinned()
    for value in range(5):
        for _ in range(20):
            matrix = torch.tanh(matrix @ matrix)
        matrix.fill_(value)
        out = transfer.start(host, matrix)
        transfer.wait(out)
        matrix.fill_(-1.0)
        target = torch.full_like(matrix, float("nan"))
        back = transfer.start(target, host)
        transfer.wait(back)
        total = target.double().mean()
        assert total.item() == value


@pytest.mark.gpu
@needs_gpu
def test_memory_of_forgotten_copies_is_not_given_to_others_before_they_are_done():
    transfer = CudaTransfer(CUDA)
    host = transfer.host_memory(2**28)
    host.fill_(7)
    address = transfer.start(torch.empty(2**28, dtype=torch.uint8, device="cuda"), host).target.data_ptr()
    other = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    assert other.data_ptr() != address
    torch.cuda.synchronize()
    assert not other.any()
    transfer.start(torch.empty(1, device="cuda"), torch.ones(1))
    assert len(transfer._under_way) == 1
