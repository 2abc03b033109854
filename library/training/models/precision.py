"""Number formats of a run, and kernels that give the same bits each time."""

from __future__ import annotations

import os
from typing import Any

import torch

from library.options.run import PRECISION_DTYPES

WEIGHT_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in PRECISION_DTYPES.items()}


def use_deterministic_kernels() -> None:
    """--deterministic: kernels whose sums have a fixed order, also on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward, and cuDNN's, add in any order
    torch.backends.cuda.enable_cudnn_sdp(False)


def allow_fp16_gradients(scaler: Any) -> None:
    """--full_fp16 keeps gradients in fp16, which the scaler refuses to unscale unless told."""
    unscale = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda optimizer, inv_scale, found_inf, allow_fp16: unscale(optimizer, inv_scale, found_inf, True)
