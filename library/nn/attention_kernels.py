"""Which program computes attention: PyTorch's own, or that of a package.

B batch · N queries · S keys · H heads · K head width. Keys and values may have fewer heads than queries, G, of which each serves
H / G neighbouring heads of queries (grouped-query attention, arXiv 2305.13245).

Masks occur where captions of unlike lengths share a batch, as in Anima's LLM adapter. A package would need the lengths on the
host, for which the step would wait, to save far less than that; so whatever is masked is computed by PyTorch in every mode, and
so is the attention to a cut source (``library/nn/zero_rows.py``), which is small by then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.errors import OptionError
from library.nn.attention_packages import PACKAGES, Package
from library.nn.zero_rows import attend_cut

TRIAL_ROWS = 64
NEEDED_DEVICE = "cuda"  # of every package
NO_MASK = (None, 0.0, False)  # nor dropout, nor causal
HALF_DTYPES = (torch.float16, torch.bfloat16)
INSTEAD = "take --attn_mode=torch"


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """``mode``: torch or a name in ``PACKAGES``. ``split``: one sample of the batch at a time, for less memory at once."""

    mode: str = "torch"
    split: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, *, log_zeros: Tensor | None = None
    ) -> Tensor:
        """q (B, N, H, K), k and v (B, S, G, K), key_mask (B, S) as in ``attend``, log_zeros () as in ``attend_cut``, which
        takes no mask and no fewer heads -> (B, N, H * K)."""
        if not self.split or q.shape[0] == 1:
            return self._together(q, k, v, key_mask, log_zeros)
        masks = [None] * q.shape[0] if key_mask is None else key_mask.split(1)
        samples = zip(q.split(1), k.split(1), v.split(1), masks, strict=True)
        return torch.cat([self._together(*sample, log_zeros) for sample in samples])

    def _together(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, log_zeros: Tensor | None) -> Tensor:
        if log_zeros is not None:
            return attend_cut(q, k, v, log_zeros)
        if key_mask is not None or k.shape[1] == 0:
            return attend(q, k, v, key_mask)
        return COMPUTE[self.mode](q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's own: q (B, N, H, K), k and v (B, S, G, K) -> (B, N, H * K).

    key_mask (B, S), true or 1 = takes part; None where nothing is masked, which lets torch take its fastest kernel.
    Where every key of a sample is masked, or S is 0, the result is zero, not NaN.
    """
    if k.shape[1] == 0:
        return q.new_zeros(q.shape).flatten(2)
    shared = k.shape[2] != q.shape[2]
    if shared and not shares_heads(q, k, v, masked=key_mask is not None):
        shared, k, v = False, with_all_heads(k, q.shape[2]), with_all_heads(v, q.shape[2])
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, rows, K)
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared).transpose(1, 2).flatten(2)
    mask = key_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
    empty = ~mask.any(dim=-1, keepdim=True)
    # An empty sample attends to everything and is erased afterwards: no 0/0 forward, no NaN gradient backward.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, enable_gqa=shared)
    return out.masked_fill(empty, 0).transpose(1, 2).flatten(2)


def shares_heads(q: Tensor, k: Tensor, v: Tensor, *, masked: bool) -> bool:
    """Whether torch's fast kernel takes fewer heads of keys as they are. On a GPU only flash attention does; elsewhere torch
    would fall back to the slow form, which keeps a number for each pair of query and key."""
    if q.device.type == "cpu":
        return True
    if q.device.type != "cuda" or masked or q.dtype not in HALF_DTYPES or torch.version.hip or torch.compiler.is_compiling():
        return False
    transposed = [x.transpose(1, 2) for x in (q, k, v)]
    parameters = torch.backends.cuda.SDPAParams(*transposed, *NO_MASK, True)  # type: ignore[call-arg,arg-type]
    return torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.can_use_flash_attention(parameters)


def with_all_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, S, G, K) -> (B, S, H, K), each head as often as there are heads of queries for it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def attend_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    k, v = with_all_heads(k, q.shape[2]), with_all_heads(v, q.shape[2])
    return memory_efficient_attention(q, k, v).flatten(2)


def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v).flatten(2)


def attend_sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Raises OptionError where gradients are recorded: the package would return a result that has none."""
    from sageattention import sageattn

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise OptionError(f"--attn_mode=sageattn computes no gradients, so it cannot train: {INSTEAD}")
    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False).flatten(2)


COMPUTE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch": attend,
    "xformers": attend_xformers,
    "flash": attend_flash,
    "sageattn": attend_sage,
}


def check_kernel(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, *, trains: bool, head_dim: int) -> None:
    """Tries the kernel on a few numbers. ``dtype``: what attention computes in (autocast's, where that is on); ``head_dim``:
    of the widest heads; ``trains``: gradients are wanted.

    Raises one OptionError that names everything that is wrong.
    """
    if kernel.mode == "torch":
        return
    package = PACKAGES[kernel.mode]
    problems = list(_problems(kernel.mode, package, device, dtype, head_dim))
    if trains and not package.trains:
        problems.append(f"{_flag(kernel.mode)} computes no gradients, so it cannot train: {INSTEAD}")
    if not problems:
        problems += _trial_problems(kernel, device, dtype, trains=trains, head_dim=head_dim)
    if problems:
        raise OptionError(*problems)


def _problems(mode: str, package: Package, device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[str]:
    flag = _flag(mode)
    try:
        importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        yield f"{flag} needs the package {package.name} ({error}): pip install {package.name}, or {INSTEAD}"
    except Exception as error:  # built for another PyTorch or CUDA: whatever loading a library can raise
        yield f"{flag}: the package {package.name} cannot be loaded ({described(error)}): install it again, or {INSTEAD}"
    if device.type != NEEDED_DEVICE:
        yield f"{flag} needs a CUDA GPU, and this runs on {device.type}: {INSTEAD}"
    given = str(dtype).removeprefix("torch.")
    if package.dtypes and given not in package.dtypes:
        yield f"{flag} computes in float16 or bfloat16, not in {given}: add --mixed_precision=bf16, or {INSTEAD}"
    if head_dim > package.head_dim:
        yield f"{flag} takes heads of up to {package.head_dim} channels; this model's have {head_dim}: {INSTEAD}"


def _trial_problems(
    kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, *, trains: bool, head_dim: int
) -> Iterator[str]:
    x = torch.ones(1, TRIAL_ROWS, 1, head_dim, device=device, dtype=dtype, requires_grad=trains)
    try:
        with torch.set_grad_enabled(trains):
            out = kernel(x, x, x)
        if trains:
            out.sum().backward()
        float(out.detach().sum())  # waits for the device: kernels fail there
    except Exception as error:  # each package has errors of its own for what it was not built for
        yield f"{_flag(kernel.mode)} does not work here ({described(error)}): {INSTEAD}"


def _flag(mode: str) -> str:
    """With the older way to write it, as far as there is one: which of the two was typed is not known here."""
    return f"--attn_mode={mode} (also written --{mode})" if mode == "xformers" else f"--attn_mode={mode}"


def described(error: Exception) -> str:
    """``Type: first line``"""
    lines: list[Any] = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {str(lines[0]).strip()}"
