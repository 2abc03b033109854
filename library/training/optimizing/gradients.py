"""The gradients of an update, as one flat tensor for each dtype.

Every parameter's ``.grad`` is a view into it, so that clearing, summing over processes, measuring and clipping are one kernel
each, however many small LoRA matrices there are. The order of an update::

    gradients.zero()
    for each micro-batch: backward()                 # adds into the views
    gradients.reduce()                               # sum over processes
    (scaler.unscale_(optimizer))                     # fp16 only; after the sum, so that all processes see the same overflow
    norm = gradients.clip()                          # these two in any order, once each; they share one measurement
    was_finite = gradients.drop_if_not_finite(loss)  # a tensor: nothing waits for the device
    optimizer.step()

A parameter that took no part in a step (module dropout) has a gradient of zeros, not None: the optimizer's moments decay for it
as they do when it takes part in another process only. Optimizers must not be asked to ``zero_grad(set_to_none=True)``; should it
happen, the next call here puts the views back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALIGNMENT_BYTES = 256  # what a CUDA allocation would have: vectorised optimizer kernels rely on aligned gradients
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_


class Gradients:
    """Flat gradients of ``params``, all of which require them. ``max_norm`` 0 measures without clipping."""

    def __init__(self, params: Iterable[nn.Parameter], *, max_norm: float):
        self._params = [param for param in params if param.requires_grad]
        self._max_norm = max_norm
        self._buffers, self._views = _flat_buffers(self._params)
        self._measured: Tensor | None = None  # this update's norm before clipping, once measured
        self._attach()

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """The buffers, one for each (device, dtype)."""
        return tuple(self._buffers)

    def zero(self) -> None:
        """Clears all gradients."""
        for param, view in zip(self._params, self._views, strict=True):
            if param.grad is not view:
                param.grad = view
        for buffer in self._buffers:
            buffer.zero_()
        self._measured = None

    def reduce(self) -> None:
        """Sums over processes; does nothing in a run of one. (The loss is divided by the global count of samples before.)"""
        self._attach()
        self._measured = None
        if _process_count() > 1:
            for buffer in self._buffers:
                dist.all_reduce(buffer, op=dist.ReduceOp.SUM)

    def drop_if_not_finite(self, loss: Tensor) -> Tensor:
        """Replaces the whole gradient by zeros when it or the loss is not finite; decided on the device.

        ``loss``: any shape; summed over processes, so that they all decide alike. Returns a bool tensor (), True = was finite.
        """
        norm = self._norm()
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach()).all().to(norm.device)
        for buffer in self._buffers:
            buffer.masked_fill_(~finite.to(buffer.device), 0)
        self._measured = torch.where(finite, norm, torch.zeros_like(norm))
        return finite

    def clip(self) -> Tensor:
        """Scales the gradient down to ``max_norm``. Returns its 2-norm before, () float32; 0 if it was dropped before."""
        norm = self._norm()
        if self._max_norm > 0:
            factor = (self._max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
            for buffer in self._buffers:
                buffer.mul_(factor.to(buffer.device))
        return norm

    def _norm(self) -> Tensor:
        self._attach()
        if self._measured is None:
            self._measured = self._measure()
        return self._measured

    def _measure(self) -> Tensor:
        norms = [torch.linalg.vector_norm(buffer, dtype=torch.float32) for buffer in self._buffers]
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def _attach(self) -> None:
        """Makes each ``.grad`` its view again, taking over what lies elsewhere; None means no gradient."""
        views, elsewhere = [], []
        for param, view in zip(self._params, self._views, strict=True):
            grad = param.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            elif grad.data_ptr() != view.data_ptr():
                views.append(view)
                elsewhere.append(grad)
            param.grad = view
            self._measured = None
        if views:
            torch._foreach_copy_(views, elsewhere)


def _flat_buffers(params: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Zeroed buffers, one for each (device, dtype), and a view of the right shape for each parameter in order."""
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    places = []
    for param in params:
        kind = param.device, param.dtype
        start = sizes.get(kind, 0)
        places.append((kind, start))
        sizes[kind] = start + _aligned(param.numel(), param.dtype)
    buffers = {kind: torch.zeros(size, device=kind[0], dtype=kind[1]) for kind, size in sizes.items()}
    views = [
        buffers[kind][start : start + param.numel()].view(param.shape)
        for param, (kind, start) in zip(params, places, strict=True)
    ]
    return list(buffers.values()), views


def _aligned(count: int, dtype: torch.dtype) -> int:
    per_block = ALIGNMENT_BYTES // dtype.itemsize
    return -(-count // per_block) * per_block


def _process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
