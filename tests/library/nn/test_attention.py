from __future__ import annotations

import pytest
import torch

from library.nn.attention import attend


def naive(q, k, v, key_mask=None):
    scores = torch.einsum("bnhk,bshk->bhns", q, k) / q.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask.bool()[:, None, None, :], float("-inf"))
    return torch.einsum("bhns,bshk->bnhk", scores.softmax(-1), v).flatten(2)


def inputs(keys: int = 6):
    return torch.randn(2, 5, 3, 8), torch.randn(2, keys, 3, 8), torch.randn(2, keys, 3, 8)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])])
def test_is_attention(mask):
    q, k, v = inputs()
    torch.testing.assert_close(attend(q, k, v, mask), naive(q, k, v, mask))


def test_fully_masked_sample_gives_zeros_and_finite_gradients():
    q, k, v = (t.requires_grad_() for t in inputs())
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    out = attend(q, k, v, mask)
    out.square().sum().backward()
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().min() > 0
    for tensor in (q, k, v):
        assert torch.isfinite(tensor.grad).all() and not tensor.grad[0].any()


def test_no_keys_at_all_give_zeros():
    q, k, v = inputs(keys=0)
    assert torch.equal(attend(q, k, v, torch.ones(2, 0)), torch.zeros(2, 5, 24))
