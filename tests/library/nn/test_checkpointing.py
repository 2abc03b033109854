from __future__ import annotations

import pytest
import torch
from torch import nn

from library.nn.blocks import run_plainly
from library.nn.checkpointing import run_checkpointed
from library.nn.zero_rows import attend_cut


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_the_same_in_the_recomputation(training):
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train(training)
    x = torch.randn(4, 8, requires_grad=True)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        out = run_checkpointed(0, block, x) if checkpointing else block(x)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *block.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_block_runs_again_only_where_gradients_are_recorded():
    runs = []
    block = nn.Linear(4, 4)
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    x = torch.randn(2, 4, requires_grad=True)
    run_checkpointed(0, block, x).sum().backward()
    assert len(runs) == 2
    with torch.no_grad():
        run_checkpointed(0, block, x)
    assert len(runs) == 3


def test_attention_that_leaves_zero_rows_out_can_be_computed_again():
    inputs = tuple(torch.randn(2, rows, 3, 16, requires_grad=True) for rows in (12, 64, 64))
    found = []
    for run_block in (run_plainly, run_checkpointed):
        out = run_block(0, attend_cut, *inputs, torch.tensor(2.0))
        found.append(torch.autograd.grad(out.square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
