from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from library.lumina import sample_rows
from library.nn.modulation import gated, modulated, scaled

B, N, D = 2, 5, 4
ROWS, SAMPLES = (B, N, D), (B, 1, D)
FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "modulated": (modulated, lambda normed, shift, scale: shift + normed * (1 + scale), (ROWS, SAMPLES, SAMPLES)),
    "gated": (gated, lambda x, gate, branch: x + gate * branch, (ROWS, SAMPLES, ROWS)),
    "scaled": (scaled, lambda x, factors: x * factors, (ROWS, SAMPLES)),
    "one token": (modulated, lambda normed, shift, scale: shift + normed * (1 + scale), ((B, 1, D), SAMPLES, SAMPLES)),
}
form = pytest.mark.parametrize("form", FORMS)


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in FORMS[name][2]]


@form
def test_is_its_formula_with_its_gradient(form):
    own, formula, _ = FORMS[form]
    inputs = inputs_of(form)
    torch.testing.assert_close(own(*inputs), formula(*inputs))
    assert torch.autograd.gradcheck(own, inputs)


@form
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_alone_may_be_learned(form, place):
    own, formula, shapes = FORMS[form]
    if place < len(shapes):
        inputs = [tensor.requires_grad_(number == place) for number, tensor in enumerate(map(Tensor.detach, inputs_of(form)))]
        assert torch.autograd.gradcheck(own, inputs)


@form
def test_no_digit_changes_when_nothing_is_learned(form):
    own, _, _ = FORMS[form]
    inputs = inputs_of(form, torch.bfloat16)
    with torch.no_grad():
        plain = own(*inputs)
    assert torch.equal(own(*inputs), plain) and own(*inputs).dtype == torch.bfloat16


@form
def test_repeated_for_checkpointing(form):
    own, _, _ = FORMS[form]
    gradients = []
    for run in (own, lambda *given: checkpoint(own, *given, use_reentrant=False)):
        inputs = inputs_of(form)
        run(*inputs).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_have_the_types_of_what_they_are_for():
    """Autocast: the stream may be wider than what a layer gives."""
    x = torch.randn(ROWS, requires_grad=True)
    gate, branch = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in (SAMPLES, ROWS))
    with torch.autocast("cpu", torch.bfloat16):
        out = gated(x, gate, branch)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad is not None and gate.grad is not None and branch.grad is not None
    assert (x.grad.dtype, gate.grad.dtype, branch.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(gate.grad, branch.detach().float().sum(1, keepdim=True).bfloat16())


class LargeTensors(TorchDispatchMode):
    """Counts the tensors of a shape that are made, not those that an operation is given to write into."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        found = function(*args, **given)
        if isinstance(found, Tensor) and tuple(found.shape) == self.shape and given.get("out") is not found:
            self.count += not function.is_view
        return found


@pytest.mark.parametrize("own", [gated, lambda x, gate, branch: sample_rows.gated(x, gate, branch, (2, 3))])
def test_the_factors_gradient_makes_nothing_as_large_as_the_tokens(own):
    rows = (1, 5, 4)
    x, branch = torch.randn(rows, requires_grad=True), torch.randn(rows, requires_grad=True)
    gate = torch.randn(2 if own is not gated else 1, 1, 4, requires_grad=True)
    out, gradient = own(x, gate, branch), torch.randn(rows)
    with LargeTensors(rows) as made:
        torch.autograd.grad(out, (x, gate, branch), gradient)
    assert made.count == 1  # the gradient of the branch
