"""Lumina Image 2.0 with weights in 8 bits: which layers, how far off they are, with captions of unlike lengths."""

from __future__ import annotations

import torch

from library.lumina.checkpoint import build_denoiser
from library.lumina.fp8_layers import DENOISER_FP8_LAYERS
from library.lumina.layout import NextDitConfig
from library.nn.fp8 import use_fp8
from library.nn.loading import load_into
from tests.golden.golden_files import relative_error
from tests.library.lumina.tiny_nextdit import TINY, batch, tiny_denoiser, tiny_weights

CHOSEN = {"attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}


def test_attention_and_mlp_of_the_blocks_are_chosen_and_nothing_else():
    paths = {layer.path for layer in use_fp8(build_denoiser(TINY), DENOISER_FP8_LAYERS)}
    assert paths == {f"layers.{block}.{name}" for block in range(TINY.blocks) for name in CHOSEN}


def test_the_published_model_takes_little_more_than_half():
    """No weight is made: by the shapes alone."""
    denoiser = build_denoiser(NextDitConfig())
    chosen = {layer.path for layer in use_fp8(denoiser, DENOISER_FP8_LAYERS)}
    sizes = {name: tensor.numel() for name, tensor in denoiser.named_parameters()}
    small = sum(size for name, size in sizes.items() if name.removesuffix(".weight") in chosen)
    assert 0.59 < 1 - small / (2 * sum(sizes.values())) < 0.63


def test_the_velocity_stays_close_and_can_be_learnt_from():
    denoiser = build_denoiser(TINY)
    use_fp8(denoiser, DENOISER_FP8_LAYERS)
    load_into(denoiser, tiny_weights().items(), device="cpu", dtype=torch.float32)
    inputs = batch((7, 3, 5))
    weight = denoiser.get_parameter("context_refiner.0.attention.out.weight").requires_grad_()
    rounded = denoiser(*inputs)
    (gradient,) = torch.autograd.grad(rounded.square().sum(), [weight])  # through all layers in 8 bits
    with torch.no_grad():
        exact = tiny_denoiser()(*inputs)
    assert 0 < relative_error(rounded.detach(), exact) < 0.15
    assert torch.isfinite(gradient).all() and gradient.any()
