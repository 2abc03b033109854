from __future__ import annotations

import pytest
import torch

from library.nn import attention_kernels
from library.nn.attention import NormedAttention
from library.nn.attention_kernels import attend, shares_heads
from library.nn.rope import apply_rope, rope_angles, rope_table


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


@pytest.mark.parametrize("takes_fewer", [True, False])
@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])])
def test_fewer_heads_of_keys_serve_neighbouring_queries(mask, takes_fewer, monkeypatch):
    if not takes_fewer:
        monkeypatch.setattr(attention_kernels, "shares_heads", lambda *tensors, masked: False)
    q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    repeated = (x.unsqueeze(3).expand(-1, -1, -1, 3, -1).flatten(2, 3) for x in (k, v))
    torch.testing.assert_close(attend(q, k, v, mask), naive(q, *repeated, mask))


@pytest.mark.gpu
def test_a_gpu_takes_fewer_heads_where_it_has_flash_attention():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    q, k = torch.randn(1, 64, 6, 96, device="cuda").bfloat16(), torch.randn(1, 64, 2, 96, device="cuda").bfloat16()
    assert shares_heads(q, k, k, masked=False)
    assert not shares_heads(q, k, k, masked=True) and not shares_heads(q.float(), k.float(), k.float(), masked=False)
    repeated = k.repeat_interleave(3, dim=2)
    torch.testing.assert_close(attend(q, k, k), attend(q, repeated, repeated), rtol=0.02, atol=0.02)


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


def test_normed_attention_is_its_parts():
    mixer = NormedAttention(12, key_width=10, heads=3, head_dim=8)
    x, source = torch.randn(2, 5, 12), torch.randn(2, 6, 10)
    tables = tuple(rope_table(rope_angles(length, 8, 100.0, torch.device("cpu"))) for length in (5, 6))
    q = mixer.q_norm(mixer.q_proj(x).unflatten(-1, (3, 8)))
    k = mixer.k_norm(mixer.k_proj(source).unflatten(-1, (3, 8)))
    v = mixer.v_proj(source).unflatten(-1, (3, 8))
    torch.testing.assert_close(mixer.mix(x, source, None), naive(q, k, v))
    torch.testing.assert_close(mixer.mix(x, source, tables), naive(apply_rope(q, tables[0]), apply_rope(k, tables[1]), v))
