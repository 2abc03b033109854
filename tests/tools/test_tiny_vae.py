"""The built autoencoder: colours come back, latents have the size that the denoiser expects."""

from __future__ import annotations

import pytest
import torch

from library.anima.vae import load_vae
from library.anima.vae_layout import read_vae_layout
from tools.tiny_vae import vae_tensors


@pytest.fixture(scope="module")
def vae(tiny_anima):
    return load_vae(read_vae_layout(tiny_anima["vae"]))


def colour_picture(*colours):
    """(1, 3, 32, 32 * n): one square of each colour, side by side."""
    return torch.cat([torch.tensor(c).view(1, 3, 1, 1).expand(1, 3, 32, 32) for c in colours], dim=3)


def test_colours_survive_the_way_there_and_back(vae):
    picture = colour_picture((0.6, -0.4, -0.5), (-0.5, 0.1, 0.6))
    back = vae.decode(vae.encode(picture))
    for square in (slice(10, 22), slice(42, 54)):  # away from the edge between them
        assert (back[..., 10:22, square].mean(dim=(2, 3)) - picture[..., 10:22, square].mean(dim=(2, 3))).abs().max() < 0.3


def test_latents_differ_between_pictures_and_have_unit_size(vae):
    colours = torch.rand(24, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    latents = torch.cat([vae.encode(colour_picture(tuple(c.tolist()))) for c in colours])
    deviation = latents.std(dim=0).mean(dim=(1, 2))  # over pictures, per channel
    assert latents.shape[1] == 16 and deviation.min() > 0.3 and deviation.max() < 2.0


def test_noise_decodes_to_something_that_is_not_constant(vae):
    pixels = vae.decode(torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert pixels.shape == (1, 3, 64, 64) and pixels.std() > 0.05


def test_any_width_has_the_published_keys():
    wide, narrow = vae_tensors(16, seed=0), vae_tensors(8, seed=0)
    assert wide.keys() == narrow.keys() and len(wide) == 194
    assert wide["encoder.conv1.weight"].shape == (16, 3, 3, 3, 3)
