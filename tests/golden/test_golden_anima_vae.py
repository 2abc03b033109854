from __future__ import annotations

import pytest

from library.anima.vae import load_vae
from library.anima.vae_layout import read_vae_layout
from library.files.safetensors_file import save_safetensors
from tests.golden.golden_files import load_golden, relative_error

TOLERANCE = 1e-5  # the file allows 1e-4


@pytest.mark.parametrize("name", ["vae_wan_layout", "vae_diffusers_layout"])
def test_encoder_and_decoder(tmp_path, name):
    golden = load_golden(f"anima/{name}.safetensors")
    save_safetensors(tmp_path / "vae.safetensors", golden.weights)
    layout = read_vae_layout(tmp_path / "vae.safetensors")
    assert list(layout.known_config.latents_mean) == golden.about["latents_mean"]
    assert list(layout.known_config.latents_std) == golden.about["latents_std"]
    assert layout.known_config.stem == golden.about["config"]["base_dim"]
    vae = load_vae(layout)
    cases = {key.split("/")[0] for key in golden.inputs}
    assert cases
    for case in cases:
        pixels, latents = golden.inputs[f"{case}/pixels"], golden.inputs[f"{case}/normalized_latents"]
        mean, log_variance = vae.moments(pixels)
        assert relative_error(mean, golden.outputs[f"{case}/encode_mean"]) < TOLERANCE
        assert relative_error(log_variance, golden.outputs[f"{case}/encode_logvar"]) < TOLERANCE
        assert relative_error(vae.encode(pixels), golden.outputs[f"{case}/trainer_latents"]) < TOLERANCE
        assert relative_error(vae.decode(latents), golden.outputs[f"{case}/decode_to_pixels"]) < TOLERANCE
