from __future__ import annotations

import json

import pytest
import torch

from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.sd.layout import SD_SCALE, SDXL_SCALE
from library.sd.vae import load_vae, posterior_sample
from library.sd.vae_layout import find_vae, vae_part
from tests.golden.golden_files import load_golden, relative_error

TOLERANCE = 2e-5  # the files allow 1e-4


@pytest.mark.parametrize(("name", "scale"), [("sd/sd1_vae", SD_SCALE), ("sdxl/sdxl_vae", SDXL_SCALE)])
def test_encoder_and_decoder(tmp_path, name, scale):
    golden = load_golden(f"{name}.safetensors")
    sizes = golden.about["config"]
    assert sizes["scale_factor"] == scale
    header = {"config": json.dumps({"vae": {"norm_groups": sizes["norm_num_groups"]}})}
    save_safetensors(tmp_path / "vae.safetensors", golden.weights, header)
    source = open_weights(tmp_path / "vae.safetensors", flag="--vae")
    place = find_vae(source.shapes)
    assert place is not None
    vae = load_vae(vae_part(source, prefix=place.prefix, layout=place.layout), device="cpu", dtype=torch.float32, scale=scale)
    cases = {key.split("/")[0] for key in golden.inputs}
    assert cases
    for case in cases:
        outputs = {key.removeprefix(f"{case}/"): value for key, value in golden.outputs.items() if key.startswith(f"{case}/")}
        moments = vae.moments(golden.inputs[f"{case}/image_u8"].float() / 127.5 - 1)
        mean, log_variance = moments.chunk(2, dim=1)
        assert relative_error(mean, outputs["mean"]) < TOLERANCE
        assert relative_error(log_variance, outputs["logvar"]) < TOLERANCE
        sample = posterior_sample(moments, golden.inputs[f"{case}/noise"])
        assert relative_error(sample, outputs["sample"]) < TOLERANCE
        assert relative_error(sample * vae.scale, outputs["scaled"]) < TOLERANCE
        decoded = vae.decode(golden.inputs[f"{case}/scaled_latents_to_decode"])
        assert relative_error(decoded, outputs["decoded"]) < TOLERANCE
        if "decoded_u8" in outputs:
            levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
            assert (levels - outputs["decoded_u8"].float()).abs().max() <= 1
