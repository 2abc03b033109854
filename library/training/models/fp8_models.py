"""Frozen weights in 8 bits, as --fp8_base and --fp8_base_unet want them: what to call before and after a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from library.errors import OptionError
from library.nn.fp8 import check_fp8, fp8_layers, keep_unquantised, use_fp8
from library.nn.fp8_speed import Gather, alone, choose_fp8_products

OWN_NETWORKS = "networks."  # modules that know layers in 8 bits; others may read ``weight`` as if it were the weight


def prepare_fp8(options: Any, denoiser: nn.Module, layers: str, *, device: torch.device) -> None:
    """Has the denoiser take the weights of ``layers`` in 8 bits when it loads, if the options say so.

    ``layers``: a regular expression of whole paths; ``device``: where the model is going to compute. Call it while the model is
    on the meta device, before the network is created. Raises OptionError.
    """
    if not (options.memory.fp8_base or options.memory.fp8_base_unet):
        return
    module = options.network.network_module or ""
    if not module.startswith(OWN_NETWORKS):
        raise OptionError(f"--fp8_base and --fp8_base_unet need a network module of this project, such as networks.lora_anima: "
                          f"{module or 'none'} may take the 8 bit weights for the weights themselves; drop the flag")  # fmt: skip
    check_fp8(device, "--fp8_base" if options.memory.fp8_base else "--fp8_base_unet")
    use_fp8(denoiser, layers)


def wait_for_merging(options: Any, *models: nn.Module) -> None:
    """Before models are loaded that ``merge_base_weights`` is going to get: it rounds them to 8 bits, if it merges anything."""
    if options.network.base_weights:
        for model in models:
            keep_unquantised(model)


def arrange_fp8(
    options: Any, denoiser: nn.Module, device: torch.device, *, dtype: torch.dtype, gather: Gather = alone
) -> Iterator[str]:
    """Once the denoiser is loaded and merged: chooses how it multiplies on ``device``. Gives a line about each model in 8 bits.

    ``gather``: of the processes that train together, which all multiply alike.

    With --deterministic nothing is left to the clock. Text encoders always dequantise, so that texts encoded at every step are
    those that would have been cached.
    """
    count = sum(1 for _ in fp8_layers(denoiser))
    if not count:
        return
    how = "dequantised for their products (--deterministic)"
    if not options.run.deterministic:
        how = choose_fp8_products(denoiser, device, dtype=dtype, gather=gather)
    yield f"{type(denoiser).__name__}: {count} layers in 8 bits, {how}"
    if options.memory.fp8_base:
        yield "text encoder: in 8 bits as well, dequantised for its products (--fp8_base_unet leaves it as it is)"
