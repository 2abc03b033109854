from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from library.nn.swiglu import silu_product


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_is_the_gate_of_swiglu_with_its_gradient(trained):
    gate, x = (torch.randn(2, 5, dtype=torch.float64, requires_grad=wanted) for wanted in trained)
    torch.testing.assert_close(silu_product(gate, x), F.silu(gate) * x)
    assert torch.autograd.gradcheck(silu_product, (gate, x))


def test_keeps_its_two_inputs_alone():
    gate, x = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        silu_product(gate, x)
    assert {tensor.data_ptr() for tensor in kept} == {gate.data_ptr(), x.data_ptr()}
