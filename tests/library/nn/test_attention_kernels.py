"""The packages are not needed here: modules of the same names and calls stand in for them, computing with plain torch."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from library.errors import OptionError
from library.nn.attention import NormedAttention, set_attention
from library.nn.attention_kernels import COMPUTE, PACKAGES, AttentionKernel, attend, check_kernel, described
from tests.library.anima.tiny_dit import batch, tiny_denoiser

CPU = torch.device("cpu")
SOME_MASKED = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
MODES = [*COMPUTE]


class StandIns:
    """xformers.ops, flash_attn and sageattention; ``calls`` has the shape of the queries of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[int, ...]] = []
        for name, functions in {
            "xformers": {},
            "xformers.ops": {"memory_efficient_attention": self.memory_efficient_attention},
            "flash_attn": {"flash_attn_func": self.flash_attn_func},
            "sageattention": {"sageattn": self.sageattn},
        }.items():
            module = ModuleType(name)
            vars(module).update(functions)
            monkeypatch.setitem(sys.modules, name, module)

    def compute(self, q, k, v):
        """(B, N, H, K) each -> (B, N, H, K)"""
        assert q.dtype == k.dtype == v.dtype and all(t.dim() == 4 and t.stride(-1) == 1 for t in (q, k, v))
        self.calls.append(tuple(q.shape))
        weights = (torch.einsum("bnhk,bshk->bhns", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("bhns,bshk->bnhk", weights, v)

    def memory_efficient_attention(self, query, key, value, attn_bias=None, p=0.0, scale=None):
        assert attn_bias is None and p == 0.0 and scale is None
        return self.compute(query, key, value)

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert dropout_p == 0.0 and softmax_scale is None and not causal
        return self.compute(q, k, v)

    def sageattn(self, q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert tensor_layout == "NHD" and not is_causal and sm_scale is None
        return self.compute(q.detach(), k.detach(), v.detach())


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(monkeypatch)


def inputs(keys: int = 6, *, samples: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, n, 3, 8, generator=generator, dtype=dtype).requires_grad_() for n in (5, keys, keys)]


def result_and_gradients(kernel, tensors, mask=None) -> list[torch.Tensor]:
    out = kernel(*tensors, mask)
    weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    gradients = torch.autograd.grad((out * weights).sum(), tensors, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True))]


@pytest.mark.parametrize("mask", [None, SOME_MASKED])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", ["torch", "xformers", "flash"])
def test_every_kernel_gives_the_same_result_and_gradients(stand_ins, mode, split, mask):
    tensors = inputs()
    found = result_and_gradients(AttentionKernel(mode, split), tensors, mask)
    for ours, expected in zip(found, result_and_gradients(attend, tensors, mask), strict=True):
        torch.testing.assert_close(ours, expected)
        assert torch.isfinite(ours).all()
    unmasked = [] if mode == "torch" or mask is not None else [(1, 5, 3, 8)] * 3 if split else [(3, 5, 3, 8)]
    assert stand_ins.calls == unmasked  # a masked source is torch's own in every mode


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_source_gives_zeros_and_no_call(stand_ins, mode, split):
    q, k, v = inputs(keys=0)
    for mask in (None, torch.ones(3, 0)):
        assert torch.equal(AttentionKernel(mode, split)(q, k, v, mask), torch.zeros(3, 5, 24, dtype=torch.float64))
    assert stand_ins.calls == []


def test_sageattn_computes_without_gradients_and_refuses_to_with_them(stand_ins):
    tensors = inputs()
    with torch.no_grad():
        torch.testing.assert_close(AttentionKernel("sageattn")(*tensors), attend(*tensors))
    for number in range(3):
        recorded = [tensor.detach().requires_grad_(place == number) for place, tensor in enumerate(tensors)]
        with pytest.raises(OptionError, match=r"sageattn computes no gradients.*--attn_mode=torch"):
            AttentionKernel("sageattn")(*recorded)
    assert len(stand_ins.calls) == 1


@pytest.mark.parametrize("mode", ["xformers", "flash", "sageattn"])
def test_a_model_computes_with_the_kernel_it_was_given(stand_ins, mode):
    denoiser, plain = tiny_denoiser(), tiny_denoiser()
    set_attention(denoiser, AttentionKernel(mode))
    assert {module.kernel.mode for module in denoiser.modules() if isinstance(module, NormedAttention)} == {mode}
    states, ids = torch.randn(2, 5, 28), torch.randint(2, 64, (2, 4))
    with torch.no_grad():
        context = denoiser.encode_context(states, None, ids, None, rows=8)
        torch.testing.assert_close(context, plain.encode_context(states, None, ids, None, rows=8))
        latents, sigmas, _ = batch()
        torch.testing.assert_close(denoiser(latents, sigmas, context), plain(latents, sigmas, context))
    assert len(stand_ins.calls) == 8  # self- and cross-attention of two blocks each
    assert {module.kernel for module in plain.modules() if isinstance(module, NormedAttention)} == {AttentionKernel()}


def test_a_split_model_gives_equal_gradients():
    found = []
    for kernel in (AttentionKernel(), AttentionKernel(split=True)):
        denoiser = tiny_denoiser()
        set_attention(denoiser, kernel)
        weights = [p.requires_grad_() for name, p in denoiser.named_parameters() if "_proj" in name]
        states, ids, mask = (
            torch.randn(2, 5, 28, generator=torch.Generator().manual_seed(3)),
            torch.ones(2, 4).long(),
            torch.ones(2, 5),
        )
        mask[0, 3:] = 0
        context = denoiser.encode_context(states, mask, ids, None, rows=128)
        latents, sigmas, _ = batch()
        loss = denoiser(latents, sigmas, context, used_rows=4).square().mean()
        found.append(torch.autograd.grad(loss, weights))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["torch", "xformers", "flash"])
@pytest.mark.parametrize("split", [False, True])
def test_a_kernel_does_not_break_a_compiled_attention(stand_ins, mode, split):
    mixer = NormedAttention(12, key_width=12, heads=3, head_dim=8)
    x = torch.randn(2, 5, 12)
    expected = mixer.mix(x, x, None)
    set_attention(mixer, AttentionKernel(mode, split))
    compiled = torch.compile(mixer.mix, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, None), expected)


def test_torch_needs_no_check():
    check_kernel(AttentionKernel(), CPU, torch.float32, trains=True, head_dim=1024)


@pytest.mark.parametrize("mode", [*PACKAGES])
def test_a_missing_package_is_named_with_its_install_command(monkeypatch, mode):
    monkeypatch.setitem(sys.modules, PACKAGES[mode].module.partition(".")[0], None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, PACKAGES[mode].module, raising=False) if "." in PACKAGES[mode].module else None
    with pytest.raises(OptionError) as caught:
        check_kernel(AttentionKernel(mode), torch.device("cuda"), torch.bfloat16, trains=False, head_dim=64)
    (problem,) = caught.value.problems
    assert problem.startswith(f"--attn_mode={mode}") and f" needs the package {PACKAGES[mode].name}" in problem
    assert ("(also written --xformers) needs" in problem) == (mode == "xformers")
    assert f"pip install {PACKAGES[mode].name}" in problem and "--attn_mode=torch" in problem


def test_a_package_that_cannot_be_loaded_is_told(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise OSError('flash.so: undefined symbol\\nmore')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(
        OptionError, match=r"flash-attn cannot be loaded \(OSError: flash.so: undefined symbol\): install it again"
    ):
        check_kernel(AttentionKernel("flash"), torch.device("cuda"), torch.bfloat16, trains=True, head_dim=64)


def test_all_that_is_wrong_is_told_at_once(stand_ins):
    with pytest.raises(OptionError) as caught:
        check_kernel(AttentionKernel("sageattn"), CPU, torch.float32, trains=True, head_dim=256)
    device, dtype, width, training = caught.value.problems
    assert "needs a CUDA GPU, and this runs on cpu" in device
    assert "not in float32: add --mixed_precision=bf16" in dtype
    assert "up to 128 channels; this model's have 256" in width
    assert "no gradients, so it cannot train" in training
    assert all("--attn_mode=sageattn" in problem and "take --attn_mode=torch" in problem for problem in caught.value.problems)
    assert stand_ins.calls == []


def test_xformers_decides_about_the_dtype_itself(stand_ins):
    with pytest.raises(OptionError) as caught:
        check_kernel(AttentionKernel("xformers"), CPU, torch.float32, trains=True, head_dim=128)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--attn_mode=xformers (also written --xformers) needs a CUDA GPU, and this runs on cpu"
    ]


def test_a_kernel_that_fails_on_a_trial_is_refused(stand_ins, monkeypatch):
    """With the CPU taken for a GPU, because a trial runs where training will."""
    monkeypatch.setattr("library.nn.attention_kernels.NEEDED_DEVICE", "cpu")
    check_kernel(AttentionKernel("flash"), CPU, torch.bfloat16, trains=True, head_dim=128)
    check_kernel(AttentionKernel("sageattn", split=True), CPU, torch.bfloat16, trains=False, head_dim=128)
    assert stand_ins.calls == [(1, 64, 1, 128)] * 2

    def no_operator(*_):
        raise NotImplementedError("No operator found for `flash_attn_func`\nlong list")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", no_operator)
    with pytest.raises(OptionError, match=r"^--attn_mode=flash does not work here \(NotImplementedError: No operator found for"):
        check_kernel(AttentionKernel("flash"), CPU, torch.bfloat16, trains=True, head_dim=128)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", lambda q, k, v: (q + k + v).detach())
    with pytest.raises(OptionError, match="does not require grad"):
        check_kernel(AttentionKernel("flash"), CPU, torch.bfloat16, trains=True, head_dim=128)


def test_errors_are_told_in_one_line():
    assert described(RuntimeError("a\nb")) == "RuntimeError: a"
    assert described(ValueError()) == "ValueError: no message"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [*PACKAGES])
def test_the_real_packages(mode):
    pytest.importorskip(PACKAGES[mode].module)
    device, trains = torch.device("cuda"), PACKAGES[mode].trains
    check_kernel(AttentionKernel(mode), device, torch.bfloat16, trains=trains, head_dim=128)
    q, k, v = (torch.randn(2, n, 4, 128, device=device, dtype=torch.bfloat16) for n in (256, 100, 100))
    found, expected = (kernel(q, k, v).float() for kernel in (AttentionKernel(mode), AttentionKernel()))
    assert (found - expected).norm() / expected.norm() < (0.02 if trains else 0.1)  # sageattn computes with 8 bits
