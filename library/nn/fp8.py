"""Frozen Linears whose weights are kept in 8 bits: float8_e4m3fn with one scale per output channel, half the bytes of bfloat16.

W = weight8 * scale, scale = the smallest power of two for which no value of the row passes the format's largest, 448.

A power of two and not amax / 448 itself: float8 has the same relative precision at every size, so the error is the same, but
products with the scale are exact. The model then computes with exactly what is stored, whatever the dtype and the order of the
factors, and a checkpoint that was float8 already stays what it was, bit by bit.

The 8 bit formats: arXiv 2209.05433. N rows (tokens of all samples) · K inputs · M outputs
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import CheckpointError, OptionError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # torch.finfo(FP8).max
SMALLEST_SCALE = 2.0**-126  # below it float32 loses bits


class Fp8Linear(nn.Linear):
    """A frozen Linear; made of a plain one by :func:`use_fp8`, quantised when it takes its weight. Its names are a Linear's.

    ``weight`` (M, K) is float8_e4m3fn, ``weight_scale`` (M, 1) float32 and not in state_dict. Until the weight is quantised (see
    ``keep_unquantised``) it has the model's dtype, ``weight_scale`` is None and the layer acts as a plain Linear does.
    ``fast``: multiply in 8 bits on the GPU, input included; see library/nn/fp8_speed.py.
    """

    weight_scale: Tensor | None
    path: str  # in its model, for messages
    waits: bool  # take_weight() keeps the weight as it is, for quantise()
    fast: bool

    def take_weight(self, tensor: Tensor) -> None:
        """Keeps ``tensor`` (M, K), quantised where it lies. Raises CheckpointError for values that are not finite."""
        self.weight, self.weight_scale = nn.Parameter(tensor, requires_grad=False), None
        if not self.waits:
            self.quantise()

    @torch.no_grad()
    def quantise(self) -> None:
        """Rounds a weight that waited; one that is quantised already stays."""
        if self.weight_scale is not None or self.weight.is_meta:
            return
        if not bool(self.weight.isfinite().all()):
            raise CheckpointError(f"{self.path}.weight has values that are not finite (NaN or infinity); the model file, or what "
                                  "was merged into it, is damaged: get it again, or leave it out")  # fmt: skip
        weight8, self.weight_scale = quantised(self.weight)
        self.weight = nn.Parameter(weight8, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in the dtype to compute in, or under autocast -> (..., M)"""
        if self.weight_scale is None:
            return F.linear(x, self.weight, self.bias)
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Fp8Product.apply(x.to(dtype), self.weight, self.weight_scale, bias, self.fast)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'float8' if self.weight_scale is not None else 'not quantised yet'}"


class _Fp8Product(torch.autograd.Function):
    """Autograd would keep the dequantised weight for the backward pass; this keeps the 8 bit one, and no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows = x.reshape(-1, x.shape[-1])  # (N, K)
        return frozen_product(rows, weight, scale, bias, fast=fast).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        return grad @ in_dtype(weight, scale, grad.dtype), None, None, None, None


# ---------------------------------------------------------------- a model's layers


def check_fp8(device: torch.device, flag: str) -> None:
    """Raises OptionError where ``device`` has no numbers of 8 bits, as Apple's GPUs."""
    try:
        torch.ones(1, device=device).to(FP8).float()
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"{flag}: this {device.type} device cannot keep weights in 8 bits ({reason}); drop the flag") from error


def use_fp8(model: nn.Module, layers: str) -> list[Fp8Linear]:
    """Makes the nn.Linears of ``model`` whose whole path matches the regular expression ``layers`` Fp8Linears, in place.

    The model is on the meta device still; weights are quantised as they are loaded. Parameters keep their names. Call it before a
    network is created for the model.
    """
    pattern = re.compile(layers)
    chosen = [(path, layer) for path, layer in model.named_modules() if pattern.fullmatch(path) and type(layer) is nn.Linear]
    assert chosen, f"{layers!r} matches no Linear of {type(model).__name__}"
    return [_converted(layer, path) for path, layer in chosen]


def _converted(layer: nn.Linear, path: str) -> Fp8Linear:
    layer.__class__ = Fp8Linear  # the object stays: whoever refers to the layer has the right one
    assert isinstance(layer, Fp8Linear)
    layer.register_buffer("weight_scale", None, persistent=False)
    layer.path, layer.waits, layer.fast = path, False, False
    return layer


def fp8_layers(model: nn.Module) -> Iterator[Fp8Linear]:
    return (layer for layer in model.modules() if isinstance(layer, Fp8Linear))


def keep_unquantised(model: nn.Module) -> None:
    """Weights that are loaded from now on wait in the model's dtype for :func:`quantise`, so that others can be merged first."""
    for layer in fp8_layers(model):
        layer.waits = True


def quantise(model: nn.Module) -> None:
    """Quantises what waits, layer by layer, where it lies. Peak memory is what waited. Nothing waits: nothing happens."""
    for layer in fp8_layers(model):
        layer.waits = False
        layer.quantise()


# ---------------------------------------------------------------- numbers


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (M, K), finite, of any dtype -> weight8 (M, K) float8_e4m3fn and scale (M, 1) float32, powers of two.

    Rounded to nearest: within 2^-4 of each value, or within 2^-17 of the row's largest where that is more.
    A row of zeros has scale 1.
    """
    largest = torch.linalg.vector_norm(weight, ord=float("inf"), dim=1, keepdim=True).float()  # (M, 1)
    mantissa, exponent = torch.frexp(largest / FP8_MAX)  # largest / 448 = mantissa * 2^exponent, 0.5 <= mantissa < 1
    smallest = exponent - (mantissa == 0.5).int()  # a power of two is large enough itself
    scale = torch.ldexp(torch.ones_like(largest), smallest).clamp_min(SMALLEST_SCALE)
    scale = torch.where(largest == 0, 1.0, scale)
    wide = weight.float() if weight.dtype == torch.float16 else weight  # whose range is too small for a scale
    return (wide / scale.to(wide.dtype)).to(FP8), scale


def in_dtype(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight (M, K) in ``dtype``: cast where scale is None, else dequantised, which is exact in bfloat16 and wider types.

    The scale goes to the weight and not to the product, because that is the smaller of the two where speed matters (a batch of
    thousands of tokens), because sums of values up to 448 pass what float16 holds, and for the backward pass.
    """
    return weight.to(dtype) if scale is None else weight.to(dtype).mul_(scale)


def frozen_product(rows: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *, fast: bool = False) -> Tensor:
    """rows (N, K) @ W^T + bias, in the rows' dtype, with a weight of any dtype (scale None) or in 8 bits -> (N, M), new.

    ``fast``: in 8 bits where the rows are bfloat16, which is all that the product by rows can give.
    """
    if fast and scale is not None and rows.dtype == torch.bfloat16:
        return fp8_product(rows, weight, scale, bias)
    frozen = in_dtype(weight, scale, rows.dtype).t()
    return rows @ frozen if bias is None else torch.addmm(bias, rows, frozen)


def fp8_product(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """rows (N, K) bfloat16 @ W^T + bias -> (N, M) bfloat16, multiplied in 8 bits: each row is quantised as well, by itself."""
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True).float()  # (N, 1)
    factor = (FP8_MAX / largest.clamp_min(1e-12)).to(rows.dtype)  # its rounding is undone with it: by 1 / factor
    rows8 = (rows * factor).to(FP8)
    out = torch._scaled_mm(rows8, weight.t(), scale_a=factor.float().reciprocal(), scale_b=scale.t(), out_dtype=rows.dtype)
    return out if bias is None else out.add_(bias)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer of input ``x`` computes: autocast's, where that is on."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
