from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.anima.conv3x3 import Conv3x3
from library.anima.vae import QwenImageVae, in_strips, load_vae
from library.anima.vae_layout import read_vae_layout
from library.errors import CheckpointError, OptionError
from library.files.safetensors_file import save_safetensors
from tests.golden.golden_files import relative_error
from tests.library.anima.tiny_vae import save_tiny_vae, tiny_vae_weights


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")


def pixels(height: int, width: int, *, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_equals_diffusers_on_random_weights_in_sizes_that_are_not_square(tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    torch.manual_seed(0)
    theirs = AutoencoderKLQwenImage(base_dim=16).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", theirs.state_dict())
    ours = load_vae(read_vae_layout(tmp_path))
    for height, width in ((24, 56), (40, 16)):
        x = pixels(height, width)
        with torch.no_grad():
            moments = theirs.encode(x.unsqueeze(2)).latent_dist
            z = torch.randn(2, 16, height // 8, width // 8)
            decoded = theirs.decode((z * ours.latents_std + ours.latents_mean).unsqueeze(2)).sample[:, :, 0].clamp(-1, 1)
        mean, log_variance = ours.moments(x)
        assert relative_error(mean, moments.mode()[:, :, 0]) < 1e-5
        assert relative_error(log_variance, moments.logvar[:, :, 0]) < 1e-5
        assert relative_error(ours.encode(x), (moments.mode()[:, :, 0] - ours.latents_mean) / ours.latents_std) < 1e-5
        assert relative_error(ours.decode(z), decoded) < 1e-5


@pytest.mark.parametrize("chunk_size", [2, 6])
def test_chunked_equals_unchunked(vae_file, chunk_size):
    whole, chunked = (load_vae(read_vae_layout(vae_file), chunk_size=size) for size in (None, chunk_size))
    x = pixels(40, 24, batch=1)
    assert relative_error(chunked.encode(x), whole.encode(x)) < 1e-5
    z = whole.encode(x)
    assert relative_error(chunked.decode(z), whole.decode(z)) < 1e-5


def test_no_strip_is_longer_than_asked_plus_its_halo():
    heights = []

    def layer(x):
        heights.append(x.shape[2])
        return x * 2

    x = torch.randn(1, 3, 21, 4)
    assert torch.equal(in_strips(layer, x, 8), x * 2)
    assert heights == [8 + 2, 8 + 4, 5 + 2]


@pytest.mark.parametrize("chunk_size", [0, 3, -2])
def test_chunk_size_must_be_even_and_positive(vae_file, chunk_size):
    with pytest.raises(OptionError, match="--vae_chunk_size"):
        load_vae(read_vae_layout(vae_file), chunk_size=chunk_size)


def test_disabled_cache_changes_nothing(vae_file):
    x = pixels(16, 16)
    layout = read_vae_layout(vae_file)
    assert torch.equal(load_vae(layout, disable_cache=True).encode(x), load_vae(layout).encode(x))


def test_pickle_file_gives_the_same_model(tmp_path, vae_file):
    x = pixels(16, 24)
    expected = load_vae(read_vae_layout(vae_file)).encode(x)
    torch.save(tiny_vae_weights(), tmp_path / "vae.pth")
    torch.save({"state_dict": tiny_vae_weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("vae.pth", "old.pth"):
        vae = load_vae(read_vae_layout(tmp_path / name))
        (tmp_path / name).write_bytes(b"")  # the model does not hang on the file
        assert torch.equal(vae.encode(x), expected)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickle_file_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.bias": Payload()}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_vae(read_vae_layout(tmp_path / "vae.pth"))
    assert not (tmp_path / "executed").exists()


def test_pickle_file_of_another_model(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="not a Qwen-Image VAE"):
        load_vae(read_vae_layout(tmp_path / "vae.pth"))


def test_bfloat16_is_near_float32(vae_file):
    x = pixels(32, 48)
    exact, half = (load_vae(read_vae_layout(vae_file), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    latents = half.encode(x)
    assert latents.dtype == torch.bfloat16
    assert relative_error(latents, exact.encode(x)) < 0.03
    assert half.decode(latents).dtype == torch.bfloat16
    assert half.latents_mean.dtype == torch.float32


def test_frozen_and_only_last_slices_in_memory(vae_file):
    vae = load_vae(read_vae_layout(vae_file))
    assert not any(parameter.requires_grad for parameter in vae.parameters()) and not vae.training
    for parameter in vae.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_sides_must_fit_the_stride(vae_file):
    with pytest.raises(ValueError, match="multiples of 8"):
        load_vae(read_vae_layout(vae_file)).encode(torch.zeros(1, 3, 20, 16))


def test_decoded_pixels_are_clamped(vae_file):
    decoded = load_vae(read_vae_layout(vae_file)).decode(50 * torch.randn(1, 16, 2, 2))
    assert decoded.shape == (1, 3, 16, 16) and decoded.abs().max() <= 1


@pytest.mark.parametrize("height", [2, 6, 34, 7])
def test_convolution_by_row_pairs_is_the_convolution(height, monkeypatch):
    monkeypatch.setattr("library.anima.conv3x3.STRIP_BYTES", 16 * 5 * 4 * 4)  # a few rows: several strips
    torch.manual_seed(0)
    conv = Conv3x3(16, 24)
    x = torch.randn(2, 16, height, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        assert relative_error(conv(x), expected) < 2e-6


def test_is_a_module_of_its_config(vae_file):
    config = read_vae_layout(vae_file).known_config
    assert set(QwenImageVae(config).state_dict()) == set(read_vae_layout(vae_file).names.values())
