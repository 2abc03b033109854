from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from library.nn.norms import RmsNorm, layer_norm, rms_norm


def test_rms_norm_is_torchs():
    x, weight = torch.randn(2, 5, 3, 8), torch.randn(8)
    x[0] *= 1e-3  # where a wrong epsilon shows
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6), rtol=1e-6, atol=1e-6)


def test_gradients_are_the_numerical_ones():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight))


def test_gradient_of_the_weight_alone():
    x, weight = torch.randn(4, 6), torch.randn(6, requires_grad=True)
    (ours,) = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), weight)
    (torchs,) = torch.autograd.grad(F.rms_norm(x, (6,), weight, 1e-6).square().sum(), weight)
    torch.testing.assert_close(ours, torchs)


def test_bf16_is_summed_in_fp32():
    x = torch.randn(3, 256).bfloat16().requires_grad_()
    weight = torch.randn(256).bfloat16()
    wide = x.detach().float().requires_grad_()
    ours, exact = rms_norm(x, weight, 1e-6), F.rms_norm(wide, (256,), weight.float(), 1e-6)
    assert torch.equal(ours, exact.bfloat16())
    ours.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(x.grad, wide.grad.bfloat16(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_dtype(dtype):
    x = torch.randn(2, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RmsNorm(8)(x).dtype == dtype
        assert layer_norm(x).dtype == dtype


def test_layer_norm_centres_and_scales():
    y = layer_norm(torch.randn(4, 64) * 7 + 3)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4), atol=1e-5, rtol=0)


def test_compiles_without_breaks():
    norm = RmsNorm(8)
    x = torch.randn(2, 8, requires_grad=True)
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), norm(x))
