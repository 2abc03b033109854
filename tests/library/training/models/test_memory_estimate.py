from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.anima.architecture import AnimaLayouts
from library.anima.checkpoint import build_denoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.layout import DenoiserConfig, DenoiserLayout
from library.anima.memory_use import LiveEncoders, memory_use
from library.memory.block_swap import BlockSwap
from library.memory.transfer import PlainTransfer
from library.nn.fp8 import use_fp8
from library.nn.memory_use import MemoryUse
from library.options.anima import AnimaTrainOptions
from library.training.models.memory_estimate import (
    activation_bytes,
    estimate_lines,
    estimate_memory,
    network_bytes,
    weight_bytes,
)
from tests.library.anima.tiny_dit import TINY, tiny_denoiser

USE = MemoryUse(kept=(100,) * 10, carried=(4,) * 10, working=30, encoders=0)
UNEQUAL = MemoryUse(kept=(10, 100, 50), carried=(9, 2, 5), outside=7, working=30, encoders=0)
BF16, FP32 = torch.bfloat16, torch.float32


def held(denoiser) -> int:
    """Bytes of the storages that the weights lie in."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in denoiser.parameters()}
    return sum(storages.values())


def test_weights_in_8_bits():
    plain, rounded = build_denoiser(TINY), build_denoiser(TINY)
    layers = use_fp8(rounded, DENOISER_FP8_LAYERS)
    saved = sum(layer.weight.numel() for layer in layers)
    assert weight_bytes(plain, BF16) == 2 * sum(p.numel() for p in plain.parameters())
    assert weight_bytes(plain, BF16) - weight_bytes(rounded, BF16) == saved


@pytest.mark.parametrize("swapped", [1, 4])
def test_swapped_weights(swapped):
    denoiser = tiny_denoiser(replace(TINY, blocks=6)).requires_grad_(False)
    told = weight_bytes(denoiser, FP32, swapped=swapped)
    assert weight_bytes(denoiser, FP32) == held(denoiser)
    BlockSwap(denoiser.blocks, swapped, device=torch.device("cpu"), transfer=PlainTransfer())
    assert told == pytest.approx(held(denoiser), rel=0.01)  # the ring's places are aligned


@pytest.mark.parametrize(("optimizer", "each"), [("AdamW", 24), ("AdamW8bit", 18), ("Lion", 20), ("Adafactor", 16)])
def test_network_and_optimizer(optimizer, each):
    options = replace(AnimaTrainOptions().optimizer, optimizer_type=optimizer)
    assert network_bytes(1000, FP32, options, fused=False) == 1000 * each
    assert network_bytes(1000, FP32, options, fused=True) == 1000 * (each - 4)


def test_activations():
    assert activation_bytes(USE, BF16, checkpointing=None) == 2 * (10 * 100 + 30)
    assert activation_bytes(USE, BF16, checkpointing="device") == 2 * (10 * 4 + 100 + 30)
    assert activation_bytes(USE, BF16, checkpointing="cpu_async") == 2 * (2 * 4 + 100 + 30)
    assert activation_bytes(UNEQUAL, FP32, checkpointing=None) == 4 * (160 + 7 + 30)
    assert activation_bytes(UNEQUAL, FP32, checkpointing="device") == 4 * (16 + 100 + 7 + 30)
    assert activation_bytes(UNEQUAL, FP32, checkpointing="cpu") == 4 * (14 + 100 + 7 + 30)


def published(**memory: object):
    """The estimate of the published model at 1024x1024, rank 16."""
    options = AnimaTrainOptions()
    options = replace(options, memory=replace(options.memory, **memory))
    denoiser = build_denoiser(DenoiserConfig())
    if options.memory.fp8_base_unet:
        use_fp8(denoiser, DENOISER_FP8_LAYERS)
    layouts = AnimaLayouts(denoiser=DenoiserLayout(config=DenoiserConfig(), sources=()))
    use = memory_use(layouts, (1024, 1024), 1, LiveEncoders())
    batch = ((1024, 1024), 1)
    return options, estimate_memory(options, denoiser, parameters=22_937_600, dtypes=(BF16, FP32), use=use, batch=batch)


def test_the_published_model_fits_where_it_should():
    """Weights: 2.09 billion values; a block keeps 96 KiB of each of 4096 tokens."""
    _, plain = published()
    assert plain.model == pytest.approx(2 * 2.09e9, rel=0.01) and plain.activations == pytest.approx(28 * 384 * 2**20, rel=0.03)
    _, smallest = published(gradient_checkpointing=True, fp8_base_unet=True)
    assert smallest.total < 5 * 2**30
    _, swapped = published(gradient_checkpointing=True, blocks_to_swap=26)
    assert swapped.model < plain.model / 3


def test_a_device_that_is_too_small_is_told_with_what_helps():
    options, estimate = published(gradient_checkpointing=True)
    (line,) = estimate_lines(estimate, 24 * 2**30, options)
    assert "for 1 of 1024x1024" in line and "text encoder" not in line
    _, warning = estimate_lines(estimate, 4 * 2**30, options)
    assert "it has 4.0 GiB" in warning and "--fp8_base_unet" in warning and "--gradient_checkpointing" not in warning


def test_small_models_are_told_in_mib():
    options, estimate = published()
    sizes = {"model": 3 * 2**20, "encoders": 0, "network": 2**19, "activations": 2**20}
    (line,) = estimate_lines(replace(estimate, **sizes), None, options)
    assert "about 4.5 MiB for 1 of 1024x1024 (model 3.0, network and optimizer 0.5, activations 1.0)" in line
