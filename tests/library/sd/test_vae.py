from __future__ import annotations

import pytest
import torch

from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.sd.layout import SD_SCALE, SDXL_SCALE
from library.sd.vae import load_vae, posterior_sample
from library.sd.vae_layout import DIFFUSERS, ORIGINAL, vae_part
from tests.library.sd.vae_files import HEADER, TINY_16, file_tensors_of, write_vae, write_vae_folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = write_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")
    part = vae_part(open_weights(path, flag="--vae"), prefix="", layout=ORIGINAL)
    return load_vae(part, device="cpu", dtype=torch.float32, scale=SD_SCALE)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_latent_depends_on_its_pixels_and_seed_alone(vae):
    pixels = images(3)
    together = vae.encode(pixels, [5, 6, 7])
    assert together.shape == (3, 4, 2, 3)
    alone = vae.encode(pixels[1:2], [6])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(alone, vae.encode(pixels[1:2], [6]))
    assert not torch.allclose(alone, vae.encode(pixels[1:2], [8]))


def test_encoding_leaves_the_default_generator_alone(vae):
    state = torch.get_rng_state()
    vae.encode(images(1), [3])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sample_is_mean_and_deviation_times_noise():
    mean, noise = torch.full((1, 1, 1, 4), 2.0), torch.ones(1, 1, 1, 4)
    log_variance = torch.tensor([0.0, -100.0, 100.0, 2.0]).view(1, 1, 1, 4)
    found = posterior_sample(torch.cat([mean, log_variance], dim=1), noise).flatten()
    expected = 2 + torch.exp(torch.tensor([0.0, -15.0, 10.0, 1.0]))  # the logarithm of the variance is cut to -30..20
    torch.testing.assert_close(found, expected)


def test_encoding_keeps_the_dtype_of_the_weights_and_computes_the_sample_in_fp32(vae):
    half = vae.to(torch.bfloat16)
    try:
        latents = half.encode(images(1), [3])
        assert latents.dtype == half.decode(latents.float()).dtype == torch.bfloat16
    finally:
        vae.to(torch.float32)


def test_latents_that_are_not_numbers_stay_so(vae):
    pixels = images(2)
    pixels[0] = float("nan")
    latents = vae.encode(pixels, [1, 2])
    assert latents[0].isnan().all() and latents[1].isfinite().all()  # the caches and the loss tell of them


def test_the_scale_of_a_config_comes_before_the_architectures(tmp_path):
    for settings, scale in (({"scaling_factor": 0.5}, 0.5), ({}, SDXL_SCALE)):
        path = write_vae_folder(tmp_path / str(scale), **settings)
        part = vae_part(open_weights(path, flag="--vae"), prefix="", layout=DIFFUSERS)
        assert load_vae(part, device="cpu", dtype=torch.float32, scale=SDXL_SCALE).scale == scale


def test_latents_of_sixteen_channels_are_shifted_and_scaled_once(tmp_path):
    path = write_vae(tmp_path / "vae.safetensors", config=TINY_16)
    part = vae_part(open_weights(path, flag="--vae"), prefix="", layout=ORIGINAL, channels=16)
    plain, shifted = (
        load_vae(part, device="cpu", dtype=torch.float32, scale=scale, shift=shift) for scale, shift in ((1.0, 0.0), (0.5, 3.0))
    )
    raw, latents = (vae.encode(images(2), [1, 2]) for vae in (plain, shifted))
    assert latents.shape == (2, 16, 2, 3)
    torch.testing.assert_close(latents, (raw - 3) * 0.5)
    torch.testing.assert_close(shifted.decode(latents), plain.decode(raw), rtol=1e-4, atol=1e-4)


def test_norms_of_a_mean_that_outweighs_its_deviation_keep_their_digits(tmp_path):
    tensors = file_tensors_of(ORIGINAL)
    tensors["encoder.conv_in.bias"] += 300
    save_safetensors(tmp_path / "vae.safetensors", tensors, HEADER)
    part = vae_part(open_weights(tmp_path / "vae.safetensors", flag="--vae"), prefix="", layout=ORIGINAL)
    found, exact = (
        load_vae(part, device="cpu", dtype=dtype, scale=1.0).moments(images(1)) for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("settings", "shift"), [({"shift_factor": 0.5}, 0.5), ({"shift_factor": 0}, 0.0), ({}, 0.0609)])
def test_the_shift_of_a_config_comes_before_the_architectures(tmp_path, settings, shift):
    path = write_vae_folder(tmp_path / "vae", model=TINY_16, **settings)
    part = vae_part(open_weights(path, flag="--vae"), prefix="", layout=DIFFUSERS, channels=16)
    assert load_vae(part, device="cpu", dtype=torch.float32, scale=1.5305, shift=0.0609).shift == shift


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_and_decodes_what_the_cpu_does(vae):
    pixels, seeds = images(2), [3, 4]
    here = vae.encode(pixels, seeds)
    picture = vae.decode(here)
    on_gpu = vae.to("cuda")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            there = on_gpu.encode(pixels.cuda(), seeds)
            decoded = on_gpu.decode(here.cuda())
    finally:
        vae.to("cpu")
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoded.cpu(), picture, rtol=1e-3, atol=1e-3)
