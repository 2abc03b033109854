"""One LoRA: a low-rank pair beside a frozen Linear or Conv2d.

y = org(x) + multiplier * alpha / rank * up(down(x))          arXiv 2106.09685, section 4.1

For a Linear, plain or in 8 bits, both terms are one autograd function that writes the second term into the first one's output:
three matrix products forward (frozen, down, up) and five backward, nothing added element by element, and the gradient of x made
in place.
Everything else (convolutions, layers whose forward is already someone else's) takes the formula as it is.

A fused Linear, such as qkv, may have one pair for each of its projections (:class:`SplitLoRAModule`): their down halves lie above
each other, so that one product makes all of down(x), and each part's up half writes into its own columns of the output.

N rows (tokens of all samples) · K inputs · M outputs · r rank (of all parts together)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import NetworkError
from library.nn.fp8 import Fp8Linear, compute_dtype, frozen_product, in_dtype
from networks.fused_parts import Sizes, block_diagonal, trained_form
from networks.selection import ALPHA, DOWN, UP, Layer


@dataclass(frozen=True, kw_only=True)
class Dropouts:
    """Chances in [0, 1). They act in train() mode only, on down(x), and what is kept is scaled so that its mean stays.

    neuron: each value; rank: one rank of one sample at all its tokens; module: the whole LoRA (kept ones are not scaled).
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.neuron or self.rank or self.module)


NO_DROPOUT = Dropouts()


class LoRAModule(nn.Module):
    """The trained pair of one frozen layer. ``apply_to()`` puts it into the layer's forward; until then nothing changes.

    State dict: alpha (0-d float32), lora_down.weight (r, K) or (r, C_in, kh, kw), lora_up.weight (M, r) or (C_out, r, 1, 1).
    The frozen layer is held in a list, so that its weights are not counted among this module's parameters, and its weight is read
    when it is needed: it may still be on the meta device now, and may be replaced later.
    """

    alpha: Tensor
    lora_down: Layer
    lora_up: Layer
    parts: Sizes = ()  # rows of the parts that have pairs of their own

    def __init__(self, lora_name: str, org_module: Layer, *, lora_dim: int, alpha: float = 0.0, multiplier: float = 1.0,
                 dropouts: Dropouts = NO_DROPOUT):  # fmt: skip
        """``alpha`` 0 means the rank. lora_down is drawn from torch's global CPU generator, lora_up is zero."""
        super().__init__()
        self.lora_name = lora_name
        self.lora_dim = lora_dim
        self._multiplier = multiplier
        self.dropouts = dropouts
        self.enabled = True
        self.org_module_ref = [org_module]
        self.lora_down, self.lora_up = _new_pair(lora_name, org_module, lora_dim)
        self.register_buffer("alpha", torch.tensor(float(alpha or lora_dim), dtype=torch.float32, device="cpu"))
        self.scale = float(self.alpha) / lora_dim
        self._settle_strength()
        self.org_forward = org_module.forward
        self.fused = _is_plain_linear(org_module)

    @property
    def multiplier(self) -> float:
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        if value != self._multiplier:
            self._multiplier = value
            self._settle_strength()

    def _settle_strength(self) -> None:
        """multiplier * alpha / rank: as a number, and on the device, where compiled code reads it.

        To a compiler numbers are constants, and there would be other code for each multiplier; so it only sees whether it is 0.
        """
        self.strength = self.scale * self._multiplier
        self.acts = self.strength != 0.0
        if self.acts:
            with torch.inference_mode(False):  # a backward pass may need it
                self.device_strength = torch.full((), self.strength, device=self.lora_up.weight.device)

    def _apply(self, *args: Any, **kwargs: Any) -> LoRAModule:
        super()._apply(*args, **kwargs)
        self._settle_strength()
        return self

    def apply_to(self) -> None:
        org = self.org_module_ref[0]
        self.org_forward, self.fused = org.forward, _is_plain_linear(org)
        if "forward" in vars(org):  # somebody's patch, which this one's forward calls
            org.forward = self.forward  # type: ignore[method-assign,assignment]
            return
        # A method of the layer itself, which finds its LoRA by an attribute: so all layers are alike to the compiler, and what
        # it makes for one transformer block serves every block. In a list the LoRA is no part of the model.
        org.lora_ref = [self]  # type: ignore[assignment]
        org.forward = MethodType(_forward_with_lora, org)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) or (B, C, H, W), in the frozen layer's dtype or under autocast -> the frozen output plus the LoRA's."""
        if not (self.enabled and self.acts):
            return self._frozen(x)
        dtype = compute_dtype(x)
        if self.fused and not torch.compiler.is_compiling():  # a compiler fuses better what it sees through
            org = self.org_module_ref[0]
            bias = None if org.bias is None else org.bias.to(dtype)
            mask = self.dropout_mask((*x.shape[:-1], self.lora_dim), x.device)
            scale, fast = (org.weight_scale, org.fast) if isinstance(org, Fp8Linear) else (None, False)
            pair = self.lora_down.weight, self.lora_up.weight
            return LoRALinear.apply(x.to(dtype), org.weight, scale, bias, *pair, mask, self.strength, fast, self.parts)
        out = self._frozen(x)
        low = self._low_rank(self.lora_down, x.to(dtype))
        mask = self.dropout_mask(low.shape, low.device)
        low = low if mask is None else low * mask.to(dtype)
        if torch.compiler.is_compiling():
            return out + self._up(low * self.device_strength)
        return torch.add(out, self._up(low), alpha=self.strength)

    def _frozen(self, x: Tensor) -> Tensor:
        org = self.org_module_ref[0]
        return type(org).forward(org, x) if self.fused else self.org_forward(x)  # type: ignore[arg-type]

    def _up(self, low: Tensor) -> Tensor:
        return self._low_rank(self.lora_up, low)

    def _low_rank(self, layer: Layer, x: Tensor) -> Tensor:
        weight = layer.weight.to(x.dtype)  # the float32 weights, in the dtype that the frozen layer computes in
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
        return F.linear(x, weight)

    def dropout_mask(self, low_shape: Sequence[int], device: torch.device) -> Tensor | None:
        """One factor for down(x), broadcastable to its shape: (B, ..., r), of a convolution (B, r, h, w). None = no dropout now.

        Draws come from torch's global generator of the device: gradient checkpointing repeats those, and the trainer seeds them.
        The choice stays a tensor: no wait for the device, no branch for the compiler, a gradient for every parameter everywhere.
        """
        drop = self.dropouts
        if not (self.training and drop.any):
            return None
        mask = torch.ones((), device=device)
        if drop.neuron:
            mask = mask * kept(torch.rand(tuple(low_shape), device=device), drop.neuron)
        if drop.rank:
            shape = [low_shape[0], *[1] * (len(low_shape) - 1)]
            shape[1 if isinstance(self.lora_down, nn.Conv2d) else -1] = self.lora_dim
            mask = mask * kept(torch.rand((low_shape[0], self.lora_dim), device=device), drop.rank).view(shape)
        if drop.module:
            mask = mask * (torch.rand((), device=device) >= drop.module)
        return mask

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file holds of it: lora_down.weight, lora_up.weight and alpha."""
        return self.state_dict()

    def rank_in(self, weights: Mapping[str, Tensor]) -> int:
        """The rank that a file must have for it."""
        return self.lora_dim

    def load_pair(self, weights: dict[str, Tensor]) -> None:
        """Copies lora_down.weight, lora_up.weight and alpha (missing: the rank) into this module; the strength follows alpha."""
        self.load_state_dict({"alpha": torch.tensor(float(self.lora_dim)), **weights})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self.alpha.clone()
        super()._load_from_state_dict(*args, **kwargs)
        if not torch.equal(before, self.alpha):  # else a rounded (bfloat16) alpha would change how a resumed run acts
            self.scale = float(self.alpha) / self.lora_dim
            self._settle_strength()

    @torch.no_grad()
    def add_to_weight(self, weights: dict[str, Tensor], device: torch.device | str | None = None) -> None:
        """W += multiplier * alpha/r * up @ down, added in float32 on ``device`` and kept in W's own dtype and place."""
        weight = self.org_module_ref[0].weight
        if weight.is_meta:
            raise NetworkError(f"{self.lora_name} cannot be merged: the model's weights are not loaded yet; load them first")
        if getattr(self.org_module_ref[0], "weight_scale", None) is not None:
            # What is smaller than half a step of 8 bits, which is most of a LoRA, would be rounded away.
            raise NetworkError(f"{self.lora_name} cannot be merged: the model's weights are in 8 bits already; merge first")
        place = device or weight.device
        down, up = weights["lora_down.weight"].to(place, torch.float32), weights["lora_up.weight"].to(place, torch.float32)
        alpha = float(weights.get("alpha", down.shape[0]))
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)  # a 1x1 convolution of up is a matrix product too
        merged = torch.add(weight.to(place, torch.float32), delta, alpha=self.multiplier * alpha / down.shape[0])
        weight.copy_(merged)

    def norm(self) -> Tensor:
        """Frobenius norm of alpha/r * up @ down, 0-d float32, by way of two r x r products: ||UD||² = sum(UᵀU * DDᵀ)."""
        up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
        return squared_norm(down, up).sqrt() * self.scale


class SplitLoRAModule(LoRAModule):
    """The pairs of a fused Linear's parts, all of one rank. lora_down.weight (P r, K), lora_up.weight (M, r); alpha is their sum.

    ``lora_dim`` is the sum of the ranks, too: what file_tensors() gives, and what is merged, is one pair of that rank and alpha.
    """

    def __init__(self, lora_name: str, org_module: nn.Linear, *, parts: Sizes, lora_dim: int, alpha: float = 0.0, **given: Any):
        """``lora_dim`` and ``alpha`` of each part; ``parts``: their rows. Everything else as LoRAModule."""
        count = len(parts)
        assert sum(parts) == org_module.out_features
        super().__init__(lora_name, org_module, lora_dim=lora_dim * count, alpha=(alpha or lora_dim) * count, **given)
        self.parts, self.part_rank = parts, lora_dim
        self.lora_up = nn.utils.skip_init(nn.Linear, lora_dim, org_module.out_features, bias=False, device="cpu").float()
        nn.init.zeros_(self.lora_up.weight)

    def _up(self, low: Tensor) -> Tensor:
        pairs = zip(low.split(self.part_rank, -1), self.lora_up.weight.to(low.dtype).split(self.parts), strict=True)
        return torch.cat([F.linear(own, up) for own, up in pairs], -1)

    def file_tensors(self) -> dict[str, Tensor]:
        up = block_diagonal(self.lora_up.weight.detach().split(self.parts))
        return {**self.state_dict(), UP: up}

    def rank_in(self, weights: Mapping[str, Tensor]) -> int:
        """Also that of one part: a pair for all rows, which each of them gets."""
        return self.part_rank if weights[DOWN].shape[0] == self.part_rank else self.lora_dim

    def load_pair(self, weights: dict[str, Tensor]) -> None:
        """Of a file: the parts' pairs as one, or one pair for all, of a part's rank. Raises NetworkError for others."""
        super().load_pair(self._as_trained(weights))

    def _as_trained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        down, up = weights[DOWN], weights[UP]
        found = trained_form(down, up, self.parts, rank=self.part_rank)
        if found is None:
            raise NetworkError(
                f"{self.lora_name}: a pair of rank {down.shape[0]} for all its {len(self.parts)} parts cannot be taken for pairs "
                f"of rank {self.part_rank} of each: leave out split_qkv"
            )
        more = len(self.parts) if down.shape[0] == self.part_rank else 1
        return {ALPHA: torch.as_tensor(weights.get(ALPHA, float(down.shape[0]))).float() * more, DOWN: found[0], UP: found[1]}

    def add_to_weight(self, weights: dict[str, Tensor], device: torch.device | str | None = None) -> None:
        """Also of what state_dict() gives."""
        up = weights[UP]
        if weights[DOWN].shape[0] != up.shape[1]:
            weights = {**weights, UP: block_diagonal(up.split(self.parts))}
        super().add_to_weight(weights, device)

    def norm(self) -> Tensor:
        """Of all parts: they change different rows, so that the squares add up."""
        downs = self.lora_down.weight.float().split(self.part_rank)
        ups = self.lora_up.weight.float().split(self.parts)
        squares = [squared_norm(down, up) for down, up in zip(downs, ups, strict=True)]
        return torch.stack(squares).sum().sqrt() * self.scale


def squared_norm(down: Tensor, up: Tensor) -> Tensor:
    """||up @ down||² of (r, K) and (M, r)."""
    return torch.sum((up.t() @ up) * (down @ down.t())).clamp_min(0.0)


def _new_pair(name: str, org: Layer, rank: int) -> tuple[Layer, Layer]:
    down: Layer
    up: Layer
    if isinstance(org, nn.Conv2d):
        if org.groups != 1 or org.padding_mode != "zeros":
            raise NetworkError(
                f"{name}: a convolution with groups or padding_mode {org.padding_mode!r} cannot have a LoRA; exclude it"
            )
        down = nn.utils.skip_init(nn.Conv2d, org.in_channels, rank, org.kernel_size, org.stride, org.padding, org.dilation,
                                  bias=False, device="cpu")  # fmt: skip
        up = nn.utils.skip_init(nn.Conv2d, rank, org.out_channels, 1, bias=False, device="cpu")
    else:
        down = nn.utils.skip_init(nn.Linear, org.in_features, rank, bias=False, device="cpu")
        up = nn.utils.skip_init(nn.Linear, rank, org.out_features, bias=False, device="cpu")
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)
    return down.float(), up.float()


def _forward_with_lora(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.lora_ref[0](x)  # type: ignore[index,operator]


def _is_plain_linear(module: nn.Module) -> bool:
    forward = type(module).forward
    return isinstance(module, nn.Linear) and forward in (nn.Linear.forward, Fp8Linear.forward) and "forward" not in vars(module)


def kept(uniform: Tensor, chance: float) -> Tensor:
    """1 / (1 - chance) where the draw in [0, 1) is above ``chance``, else 0."""
    return (uniform > chance) / (1.0 - chance)


class LoRALinear(torch.autograd.Function):
    """The frozen Linear plus its LoRA. ``weight`` (M, K), ``scale`` and ``bias`` get no gradient."""

    @staticmethod
    def forward(  # noqa: PLR0913  # torch passes what apply() was given, by position
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, down: Tensor, up: Tensor,
        mask: Tensor | None, strength: float, fast: bool, parts: Sizes = (),
    ) -> Tensor:  # fmt: skip
        """x (..., K) in the dtype to compute in; down (r, K) and up (M, r) in any; mask broadcastable to (..., r), or None.

        scale (M, 1) and ``fast``: of an Fp8Linear. What is kept for the backward pass is its weight in 8 bits. ``parts``: rows of
        up that have a pair of their own; then up is (M, r / P).
        """
        ctx.strength, ctx.grad_dtypes, ctx.parts = strength, (down.dtype, up.dtype), parts
        down, up = down.to(x.dtype), up.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])  # (N, K)
        out = frozen_product(rows, weight, scale, bias, fast=fast)  # (N, M)
        low = _masked(rows @ down.t(), mask, x)  # (N, r)
        if not parts:
            out.addmm_(low, up.t(), alpha=strength)
        for own_out, own_low, own_up in _by_part(out, low, up, parts):
            own_out.addmm_(own_low, own_up.t(), alpha=strength)
        ctx.save_for_backward(x, weight, scale, down, up, low, mask)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale, down, up, low, mask = ctx.saved_tensors
        wants_x, wants_down, wants_up = (ctx.needs_input_grad[place] for place in (0, 4, 5))
        grad = grad.reshape(-1, grad.shape[-1])  # (N, M)
        grad_x = grad_down = grad_up = None
        if wants_x or wants_down:
            grad_low = _masked(_grad_of_low(grad, up, ctx.strength, ctx.parts), mask, x)  # (N, r)
        if wants_x:
            grad_x = (grad @ in_dtype(weight, scale, x.dtype)).addmm_(grad_low, down).view(x.shape)
        if wants_down:
            grad_down = (grad_low.t() @ x.reshape(-1, x.shape[-1])).to(ctx.grad_dtypes[0])  # (r, K)
        if wants_up:  # through its transpose: several times faster on a CPU than a product with the wide side first
            transposed = _grad_of_up(grad, low, ctx.strength, ctx.parts)  # (r, M)
            grad_up = torch.empty_like(up, dtype=ctx.grad_dtypes[1]).copy_(transposed.t())
        return grad_x, None, None, None, grad_down, grad_up, None, None, None, None


def _masked(low: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    if mask is None:
        return low
    return (low.view(*x.shape[:-1], low.shape[-1]) * mask.to(low.dtype)).view(low.shape)


def _by_part(out: Tensor, low: Tensor, up: Tensor, parts: Sizes) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(N, M), (N, P r), (M, r) -> of each part its columns (N, M_i) and (N, r) and its rows (M_i, r)."""
    if parts:
        yield from zip(out.split(parts, 1), low.split(up.shape[1], 1), up.split(parts), strict=True)


def _grad_of_low(grad: Tensor, up: Tensor, strength: float, parts: Sizes) -> Tensor:
    """(N, M), (M, r) -> (N, P r)"""
    if not parts:
        return _scaled_product(grad, up, strength)
    grad_low = grad.new_empty(grad.shape[0], len(parts) * up.shape[1])
    for own_grad, own_low, own_up in _by_part(grad, grad_low, up, parts):
        torch.addmm(own_low, own_grad, own_up, beta=0, alpha=strength, out=own_low)
    return grad_low


def _grad_of_up(grad: Tensor, low: Tensor, strength: float, parts: Sizes) -> Tensor:
    """(N, M), (N, P r) -> (r, M)"""
    if not parts:
        return _scaled_product(low.t(), grad, strength)
    rank = low.shape[1] // len(parts)
    grad_up = grad.new_empty(rank, grad.shape[1])
    for own_grad, own_low, own in zip(grad.split(parts, 1), low.split(rank, 1), grad_up.split(parts, 1), strict=True):
        torch.addmm(own, own_low.t(), own_grad, beta=0, alpha=strength, out=own)
    return grad_up


def _scaled_product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a @ b in one kernel."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)
