from __future__ import annotations

import pytest
import torch

from library.anima.checkpoint import build_denoiser, load_denoiser
from library.anima.layout import read_denoiser_layout
from library.anima.sampling import encode_context, velocity_of
from library.anima.text import AnimaConditioning
from library.nn.initial_noise import initial_noises


@pytest.fixture(scope="module")
def denoiser(tiny_anima):
    layout = read_denoiser_layout(tiny_anima["dit"])
    denoiser = build_denoiser(layout.config)
    load_denoiser(denoiser, layout, device="cpu", dtype=torch.float32)
    return denoiser


@torch.no_grad()
def test_an_empty_text_becomes_512_rows_of_which_one_is_used(denoiser):
    empty = AnimaConditioning.empty(denoiser.config.adapter.source_width)
    text = encode_context(denoiser, empty)
    assert text.context.shape == (1, 512, denoiser.config.context_dim) and text.used_rows == 1
    assert text.context[:, 0].abs().sum() > 0 and not text.context[:, 1:].any()  # </s> alone


@torch.no_grad()
def test_samplers_get_the_denoisers_velocity(denoiser):
    text = encode_context(denoiser, AnimaConditioning.empty(denoiser.config.adapter.source_width)).repeated(2)
    latents, sigmas = initial_noises([1, 2], (64, 64)), torch.tensor([0.7, 0.3])
    torch.testing.assert_close(velocity_of(denoiser)(latents, sigmas, text), denoiser(latents, sigmas, text.context))
