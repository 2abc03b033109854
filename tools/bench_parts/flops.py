"""How many floating-point operations a training step cannot do without: Anima's by formula, any model's by counting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from library.anima.layout import CONTEXT_ROWS, DenoiserConfig


def counted_flops(work: Callable[[], object]) -> int:
    """Of the matrix products, convolutions and attention of ``work``, which may be on the meta device: two for each
    multiplication and addition, nothing for all else. Gradients that nobody asks for, such as those of frozen weights, are not
    among them.

    Attention is counted as plain products, so that the one that fused kernels add to the backward pass does not count.
    """
    in_place: dict[Any, Any] = {torch.ops.aten.addmm_: _in_place_product_flops}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted, sdpa_kernel(SDPBackend.MATH):
        work()
    return counted.get_total_flops()


def _in_place_product_flops(_: Any, a: Any, b: Any, **how: Any) -> int:
    """Shapes (N, K) and (K, M), as the counter gives them."""
    return mm_flop(a, b)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """What a step is made of. ``rank`` of a LoRA on all attention and MLP layers of the blocks; 0 = none, no gradients."""

    tokens: int  # of one image: latent rows / 2 * columns / 2
    rank: int
    images: int = 1
    context_rows: int = CONTEXT_ROWS


def step_flops(config: DenoiserConfig, size: StepSize, *, checkpointing: bool = False) -> int:
    """Of forward and backward; two for each multiplication and addition of a matrix product, nothing for all else.

    N tokens, T context rows, D width, C context width, I = heads * head width, F MLP width, A modulation width, r rank,
    in c channels and patches of p. Multiplications of one image, layer by layer (inputs x outputs, times rows):

        Linear, adapted   N (4 D I) self-attention: q, k, v, out;  N (2 D I) + T (2 C I) cross-attention;  N (2 D F) MLP
        attention         N N (2 I) self: q k^T and the product with v;  N T (2 I) cross
        LoRA              r (inputs + outputs) for each row of each adapted Linear
        modulation        3 (D A + 3 A D) of a block, one row each;  D A + 2 A D of the final layer
        ends              N (c + 1) p^2 D patches in;  N D c p^2 patches out;  D D + 3 D D noise level

    Backward, with frozen weights: a Linear's input gradient is one more product of its size, except where nothing below asks for
    one (patches in, modulation, noise level; q, k, v of the first block; k, v of the context). Attention has four products where
    forward has two (a fused kernel makes a fifth, which is not counted: it saves memory, not work). A LoRA has twice its forward
    products (the gradients of both its weights, and of what is between and before them), less r * inputs where the input asks for
    none. ``checkpointing`` adds the blocks' forward again.
    """
    forward, backward = _blocks_forward(config, size), _blocks_backward(config, size)
    ends = _ends_forward(config, size)
    if not size.rank:
        return 2 * size.images * (forward + ends)
    out = size.tokens * config.width * config.in_channels * config.patch**2
    return 2 * size.images * (forward * (1 + checkpointing) + backward + ends + out)


def _blocks_forward(config: DenoiserConfig, size: StepSize) -> int:
    modulation = 3 * (config.width * config.adaln_dim + config.adaln_dim * 3 * config.width)
    return config.blocks * (_linears(config, size) + _attention(config, size) + _lora(config, size) + modulation)


def _blocks_backward(config: DenoiserConfig, size: StepSize) -> int:
    inner, r = config.heads * config.head_dim, size.rank
    whole = _linears(config, size) + 2 * _attention(config, size) + 2 * _lora(config, size)
    of_context = size.context_rows * 2 * config.context_dim * (inner + r)  # k and v in every block
    of_first = size.tokens * 3 * config.width * (inner + r)  # q, k and v of what enters the first
    return config.blocks * (whole - of_context) - of_first


def _linears(config: DenoiserConfig, size: StepSize) -> int:
    return sum(rows * inputs * outputs for rows, inputs, outputs in _adapted(config, size))


def _lora(config: DenoiserConfig, size: StepSize) -> int:
    return sum(rows * size.rank * (inputs + outputs) for rows, inputs, outputs in _adapted(config, size))


def _adapted(config: DenoiserConfig, size: StepSize) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of the Linears of one block that get a LoRA."""
    inner, n, t = config.heads * config.head_dim, size.tokens, size.context_rows
    attention = [(n, config.width, inner)] * 3 + [(n, inner, config.width)]
    cross = [(n, config.width, inner), (t, config.context_dim, inner), (t, config.context_dim, inner), (n, inner, config.width)]
    return [*attention, *cross, (n, config.width, config.mlp_hidden), (n, config.mlp_hidden, config.width)]


def _attention(config: DenoiserConfig, size: StepSize) -> int:
    return 2 * size.tokens * (size.tokens + size.context_rows) * config.heads * config.head_dim


def _ends_forward(config: DenoiserConfig, size: StepSize) -> int:
    patches = size.tokens * config.patch**2 * (2 * config.in_channels + 1) * config.width
    final_modulation = config.width * config.adaln_dim + config.adaln_dim * 2 * config.width
    return patches + final_modulation + 4 * config.width**2
