"""Attention to a source whose last rows are zero, without computing with those rows.

A row of zeros has a key and a value of zero, so it adds exp(0) = 1 to the sum Z under a query's softmax, and nothing above it.
With n of them left out, the result is that of the other rows times Z / (Z + n), and log Z is what flash attention
(arXiv 2205.14135) returns for its own backward. That backward is right for the whole source when it is given the whole sum and
the scaled result, because it computes the weights anew from them. So there is no mask, and no kernel but the usual ones.

On a CPU a training step of one block of Anima's size takes 6 % less time so at 1024 image tokens and 2 % less at 4096, with a
caption of 60 tokens in a context of 512 rows: ``python tools/bench.py attention``.

B batch · N queries · S keys that are not left out · H heads · K head width
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TRIAL_ROWS, TRIAL_ZEROS, TRIAL_TOLERANCE = 128, 448, 0.03  # bfloat16 rounds by up to 0.004 in each of several steps
STEP_ROWS = 64  # sources are cut to a multiple of this, so that compiled code meets few lengths
CUDA_DTYPES = (torch.float16, torch.bfloat16)
CUDA_WIDEST_HEAD = 128  # channels; every GPU that has the kernel takes these, forward and backward


def cut_zero_rows(source: Tensor, used: int) -> tuple[Tensor, Tensor | None]:
    """source (B, S, C), zero from row ``used`` on in every sample -> its first rows, and the log of how many are left out (0-d).

    Nothing is cut (None) unless half of the rows can go: then the products are at most half, which outweighs that scaling
    reads and writes the result once more, and that torch may know a faster kernel for the whole than flash attention.
    """
    rows = source.shape[1]
    kept = -(-max(used, 1) // STEP_ROWS) * STEP_ROWS
    if 2 * kept > rows:
        return source, None
    return source[:, :kept].contiguous(), torch.full((), math.log(rows - kept), device=source.device)


def can_cut(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``attend_cut`` runs there, in this dtype."""
    if device.type == "cpu":
        return dtype.is_floating_point
    if device.type != "cuda" or torch.version.hip or head_dim % 8 or head_dim > CUDA_WIDEST_HEAD or dtype not in CUDA_DTYPES:
        return False
    kernel = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    return bool(kernel) and torch.cuda.get_device_capability(device) >= (8, 0) and agrees(device, dtype, head_dim)


@cache
def agrees(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``attend_cut`` gives there what attention to all rows gives, with its gradients: tried once.

    The kernels are called by names that torch does not promise to keep.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(1, rows, 2, head_dim, generator=generator) for rows in (TRIAL_ROWS, STEP_ROWS, STEP_ROWS)]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in numbers)
        try:
            cut = attend_cut(q, k, v, torch.full((), math.log(TRIAL_ZEROS), device=device))
            ours = cut, *torch.autograd.grad(cut.square().sum(), (q, k, v))
            whole = _attend_to_all(q, k, v)
            theirs = whole, *torch.autograd.grad(whole.square().sum(), (q, k, v))
        except Exception:  # a kernel that is not there, or takes other arguments: torch has many ways to say so
            return False
    return all(_close(a, b) for a, b in zip(ours, theirs, strict=True))


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (F.pad(tensor, (0, 0, 0, 0, 0, TRIAL_ZEROS)) for tensor in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _close(a: Tensor, b: Tensor) -> bool:
    error, size = (a.float() - b.float()).norm(), b.float().norm()
    return bool(error <= TRIAL_TOLERANCE * size)  # False for NaN


def attend_cut(q: Tensor, k: Tensor, v: Tensor, log_zeros: Tensor) -> Tensor:
    """q (B, N, H, K), k and v (B, S, H, K), log_zeros () -> (B, N, H * K): attention to S rows and exp(log_zeros) zero ones."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, K)
    return _CutAttention.apply(q, k, v, log_zeros).transpose(1, 2).flatten(2)


class _CutAttention(torch.autograd.Function):
    """The kernels under ``scaled_dot_product_attention``, called by name, because torch hands out log Z in no other way."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_zeros: Tensor) -> Tensor:
        if q.device.type == "cpu":
            out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            rest: tuple[Any, ...] = (0.0, False)  # dropout, causal
            held: tuple[Tensor | None, ...] = ()
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
            out, log_sum, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = found
            rest, held = (longest_q, longest_k, 0.0, False), (starts_q, starts_k, seed, offset)
        out = out.mul_(torch.sigmoid(log_sum - log_zeros).unsqueeze(-1))  # Z / (Z + n) of each query and head
        ctx.rest = rest
        ctx.save_for_backward(q, k, v, out, torch.logaddexp(log_sum, log_zeros), *held)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing hands them out only once
        tensors, held = saved[:5], saved[5:]
        if not held:
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            return *backward(grads[0], *tensors, *ctx.rest), None
        starts, randoms = held[:2], held[2:]
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return *backward(grads[0], *tensors, *starts, *ctx.rest, *randoms), None
