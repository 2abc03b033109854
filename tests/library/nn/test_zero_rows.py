from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.nn import zero_rows
from library.nn.attention_kernels import AttentionKernel, attend
from library.nn.zero_rows import _CutAttention, agrees, attend_cut, can_cut, cut_zero_rows

CPU = torch.device("cpu")


def tensors(rows: int, zeros: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q of 5 queries, k and v of ``rows`` keys and ``zeros`` rows of zeros; 2 samples, 3 heads of 8 channels."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (5, rows, rows))
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, zeros)) for t in (3 * k, v))
    return [t.requires_grad_() for t in (q, k, v)]


@pytest.mark.parametrize(("rows", "zeros"), [(4, 1), (4, 500), (1, 7), (64, 448)])
@pytest.mark.parametrize("split", [False, True])
def test_result_and_gradients_are_those_with_the_rows(rows, zeros, split):
    q, k, v = tensors(rows, zeros)
    weights = torch.randn(2, 5, 24, dtype=torch.float64)
    whole = attend(q, k, v)
    cut = AttentionKernel(split=split)(q, k[:, :rows], v[:, :rows], log_zeros=torch.tensor(math.log(zeros)))
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-7)
    expected = torch.autograd.grad((whole * weights).sum(), (q, k, v))
    found = torch.autograd.grad((cut * weights).sum(), (q, k, v))
    assert not found[1][:, rows:].any() and not found[2][:, rows:].any()
    for ours, theirs in zip(found, (expected[0], expected[1][:, :rows], expected[2][:, :rows]), strict=True):
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, rtol=1e-6, atol=1e-7)


def test_zero_rows_inside_of_what_is_kept_count_too():
    q, k, v = tensors(4, 60)
    log_zeros = torch.tensor(math.log(40))
    torch.testing.assert_close(attend_cut(q, k[:, :24], v[:, :24], log_zeros), attend(q, k, v), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_stay_what_they_are(dtype):
    q, k, v = tensors(6, 20, dtype)
    cut = attend_cut(q, k[:, :6], v[:, :6], torch.tensor(math.log(20)))
    exact = attend(q.double(), k.double(), v.double())
    assert cut.dtype == dtype
    assert (cut - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 0.01)


def test_large_scores_do_not_overflow():
    q, k, v = tensors(6, 20, torch.float32)
    q, k = (100 * t.detach().requires_grad_() for t in (q, k))
    cut = attend_cut(q, k[:, :6], v[:, :6], torch.tensor(math.log(20)))
    torch.testing.assert_close(cut, attend(q, k, v))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(cut.sum(), (q, k, v)))


@pytest.mark.parametrize(("used", "kept"), [(0, 64), (1, 64), (64, 64), (65, 128), (256, 256), (257, None), (512, None)])
def test_a_source_is_cut_to_multiples_where_half_of_it_can_go(used, kept):
    source = torch.randn(2, 512, 3)
    found, log_zeros = cut_zero_rows(source, used)
    if kept is None:
        assert found is source and log_zeros is None
        return
    assert torch.equal(found, source[:, :kept]) and found.is_contiguous()
    assert log_zeros.shape == () and log_zeros.dtype == torch.float32
    assert log_zeros.item() == pytest.approx(math.log(512 - kept))


def test_short_sources_are_left_as_they_are():
    source = torch.randn(2, 100, 3)
    assert cut_zero_rows(source, 5)[0] is source


def test_where_it_is_known_to_run(monkeypatch):
    assert can_cut(CPU, torch.float32, 24) and can_cut(CPU, torch.bfloat16, 128)
    assert not can_cut(torch.device("mps"), torch.float16, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(zero_rows, "agrees", lambda *_: True)
    gpu = torch.device("cuda")
    assert can_cut(gpu, torch.bfloat16, 128) and can_cut(gpu, torch.float16, 64)
    assert not can_cut(gpu, torch.float32, 128)
    assert not can_cut(gpu, torch.bfloat16, 256) and not can_cut(gpu, torch.bfloat16, 12)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not can_cut(gpu, torch.bfloat16, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not can_cut(gpu, torch.bfloat16, 128)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(zero_rows, "agrees", lambda *_: False)
    assert not can_cut(gpu, torch.bfloat16, 128)


class Context:
    """Stands in for autograd's, which aborts where a pretended GPU is all there is."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def test_the_gpus_kernels_are_called_as_they_are_declared():
    """Shapes only: torch checks the calls against its declarations without a GPU."""
    context = Context()
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(2, 4, n, 128, device="cuda", dtype=torch.bfloat16) for n in (96, 64, 64))
        out = _CutAttention.forward(context, q, k, v, torch.empty((), device="cuda"))
        gradients = _CutAttention.backward(context, torch.empty_like(out))
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.device.type == "cuda"
    assert [g if g is None else tuple(g.shape) for g in gradients] == [*(tuple(t.shape) for t in (q, k, v)), None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 128, generator=generator).cuda().bfloat16() for n in (256, 64, 64))
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 448)).requires_grad_() for t in (k, v))
    q.requires_grad_()
    assert can_cut(q.device, q.dtype, 128)
    forms = attend(q, k, v), attend_cut(q, k[:, :64], v[:, :64], torch.tensor(math.log(448), device="cuda"))
    results = [(out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))) for out in forms]
    for whole, cut in zip(*results, strict=True):
        valid = whole[:, :64] if whole.shape[1] == 512 else whole
        assert (cut[:, : valid.shape[1]] - valid).norm() / valid.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_of_the_kernels_passes_where_they_are_right(dtype):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as where a model asks for it
        assert agrees.__wrapped__(torch.device("cpu"), dtype, 64)


@pytest.mark.parametrize("fault", ["forward", "backward", "missing"])
def test_the_trial_of_the_kernels_fails_where_they_are_not(monkeypatch, fault):
    right = zero_rows.attend_cut

    def wrong(q, k, v, log_zeros):
        if fault == "missing":
            raise AttributeError("no such operator")
        if fault == "forward":
            return right(q, k, v, log_zeros) * 1.1
        return right(q, k, v * 2 - v.detach(), log_zeros)  # the same values, another gradient

    monkeypatch.setattr(zero_rows, "attend_cut", wrong)
    assert not agrees.__wrapped__(torch.device("cpu"), torch.float32, 64)
