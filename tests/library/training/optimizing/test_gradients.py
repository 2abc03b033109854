from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from library.training.optimizing.gradients import Gradients

SHAPES = ((3, 5), (7,), (2, 3, 1, 1))


def weights(*dtypes: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    kinds = dtypes or (torch.float32,)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(kind)) for shape in SHAPES for kind in kinds]


def backward(params: list[nn.Parameter], factor: float = 1.0) -> None:
    sum((param.float() ** 3).sum() * factor for param in params).backward()


@pytest.mark.parametrize("max_norm", [0.5, 1000.0, 0.0])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=str)
def test_clips_as_torch_does(max_norm, dtypes):
    params, expected = weights(*dtypes), weights(*dtypes)
    gradients = Gradients(params, max_norm=max_norm)
    backward(params)
    backward(expected)
    gradients.reduce()
    norm = gradients.clip()
    expected_norm = torch.nn.utils.clip_grad_norm_(expected, max_norm or torch.inf)
    rounding = 1e-6 if dtypes == (torch.float32,) else 1e-2
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected_norm.item(), rel=rounding)
    assert all(torch.allclose(a.grad, b.grad, rtol=rounding) for a, b in zip(params, expected, strict=True))


def test_gradients_are_views_of_one_tensor():
    params = weights()
    gradients = Gradients(params, max_norm=1.0)
    backward(params)
    (flat,) = gradients.flat
    places = range(flat.data_ptr(), flat.data_ptr() + flat.nbytes)
    assert all(param.grad.data_ptr() in places for param in params)
    assert all(param.grad.data_ptr() % 256 == flat.data_ptr() % 256 for param in params)
    assert flat.sum().item() == pytest.approx(sum(param.grad.sum().item() for param in params), rel=1e-5)


def test_one_buffer_for_each_dtype():
    gradients = Gradients(weights(torch.float32, torch.bfloat16), max_norm=1.0)
    assert {buffer.dtype for buffer in gradients.flat} == {torch.float32, torch.bfloat16}


def test_micro_batches_add_up_and_zero_clears():
    params = weights()
    gradients = Gradients(params, max_norm=0)
    backward(params)
    once = params[0].grad.clone()
    backward(params)
    assert torch.equal(params[0].grad, 2 * once)
    gradients.zero()
    assert not params[0].grad.any()
    assert gradients.clip() == 0


def test_a_weight_without_a_part_in_the_step():
    params = weights()
    gradients = Gradients(params, max_norm=1.0)
    backward(params[:2])
    gradients.reduce()
    norm = gradients.clip()
    assert torch.isfinite(norm)
    assert not params[2].grad.any()
    torch.optim.AdamW(params, lr=0.1).step()
    assert all(torch.isfinite(param).all() for param in params)


def test_frozen_parameters_are_left_alone():
    params = weights()
    params[1].requires_grad_(False)
    Gradients(params, max_norm=1.0)
    assert params[1].grad is None


@pytest.mark.parametrize("clip_first", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_is_dropped_whole(bad, clip_first):
    params = weights()
    gradients = Gradients(params, max_norm=0.5)
    backward(params)
    params[1].grad[0] = bad
    gradients.reduce()
    if clip_first:
        assert not torch.isfinite(gradients.clip())
    finite = gradients.drop_if_not_finite(torch.tensor(1.0))
    if not clip_first:
        assert gradients.clip() == 0
    assert finite.shape == ()
    assert not finite
    assert not any(param.grad.any() for param in params)


def test_a_bad_loss_drops_the_gradient():
    params = weights()
    gradients = Gradients(params, max_norm=0.5)
    backward(params)
    assert not gradients.drop_if_not_finite(torch.tensor([1.0, float("inf")]))
    assert not any(param.grad.any() for param in params)


@pytest.mark.parametrize("clip_first", [True, False])
def test_a_good_gradient_is_kept(clip_first):
    params, expected = weights(), weights()
    gradients = Gradients(params, max_norm=0.5)
    backward(params)
    backward(expected)
    calls = [gradients.clip, lambda: gradients.drop_if_not_finite(torch.tensor(2.0))]
    results = [call() for call in (calls if clip_first else reversed(calls))]
    norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
    assert results[0 if clip_first else 1].item() == pytest.approx(norm.item(), rel=1e-6)
    assert bool(results[1 if clip_first else 0])
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(params, expected, strict=True))


def test_the_next_update_is_measured_anew():
    params = weights()
    gradients = Gradients(params, max_norm=0)
    backward(params)
    gradients.reduce()
    first = gradients.clip().item()
    gradients.zero()
    backward(params, factor=2.0)
    gradients.reduce()
    assert gradients.clip().item() == pytest.approx(2 * first, rel=1e-6)


def test_views_come_back_after_a_foreign_zero_grad():
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1)
    gradients = Gradients(params, max_norm=0)
    backward(params)
    optimizer.zero_grad(set_to_none=True)
    backward(params[:1])  # a new tensor, outside the buffer
    expected = params[0].grad.clone()
    gradients.reduce()
    assert torch.equal(params[0].grad, expected)
    assert gradients.clip().item() == pytest.approx(expected.norm().item(), rel=1e-6)
    assert not params[1].grad.any()
    optimizer.zero_grad(set_to_none=True)
    gradients.zero()
    backward(params)
    assert gradients.flat[0].any()


def test_training_equals_torch():
    """Five steps with clipping: the same weights as with torch's own functions, to rounding."""
    params, expected = weights(), weights()
    gradients = Gradients(params, max_norm=0.5)
    ours, theirs = torch.optim.AdamW(params, lr=0.01), torch.optim.AdamW(expected, lr=0.01)
    for _ in range(5):
        backward(params)
        gradients.reduce()
        gradients.clip()
        ours.step()
        gradients.zero()
        theirs.zero_grad()
        backward(expected)
        torch.nn.utils.clip_grad_norm_(expected, 0.5)
        theirs.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(params, expected, strict=True))


WORKER = """
import sys, torch, torch.distributed as dist
from library.training.optimizing.gradients import Gradients
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
param = torch.nn.Parameter(torch.ones(3, 4))
half = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
gradients = Gradients([param, half], max_norm=0)
(param * (rank + 1)).sum().backward()
if rank == 0:
    half.sum().backward()  # takes part in one process only
gradients.reduce()
assert torch.equal(param.grad, torch.full((3, 4), 3.0)), param.grad
assert torch.equal(half.grad, torch.ones(5, dtype=torch.bfloat16)), half.grad
if rank == 1:
    param.grad[0, 0] = float("nan")
gradients.reduce()
assert not gradients.drop_if_not_finite(torch.tensor(1.0))  # both drop it
assert not param.grad.any()
dist.destroy_process_group()
"""


def test_two_processes_sum(tmp_path):
    root = Path(__file__).parents[4]
    command = [sys.executable, "-c", WORKER]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=root, stderr=subprocess.PIPE) for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


def test_scaled_gradients_of_fp16_runs():
    """The scaler multiplies the loss, and unscales the views in place; an overflow is dropped and makes the scaler skip."""
    params, expected = weights(), weights()
    gradients = Gradients(params, max_norm=0.5)
    optimizer = torch.optim.SGD(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for bad in (False, True):
        before = [param.detach().clone() for param in params]
        scaler.scale(sum((param**3).sum() for param in params)).backward()
        if bad:
            params[0].grad[0, 0] = float("inf")
        gradients.reduce()
        scaler.unscale_(optimizer)
        gradients.clip()
        assert bool(gradients.drop_if_not_finite(torch.tensor(1.0))) is not bad
        scaler.step(optimizer)
        scaler.update()
        gradients.zero()
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True)) is bad
    backward(expected)
    torch.nn.utils.clip_grad_norm_(expected, 0.5)
    torch.optim.SGD(expected, lr=0.1).step()
    assert all(torch.allclose(a, b) for a, b in zip(params, expected, strict=True))
    assert scaler.get_scale() == 2.0**9
