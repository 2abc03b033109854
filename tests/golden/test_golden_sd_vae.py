from __future__ import annotations

import pytest

from library.sd.layout import SD_SCALE, SDXL_SCALE
from library.sd.vae import posterior_sample
from tests.golden.golden_files import load_golden, relative_error
from tests.golden.vae_of_golden import loaded_vae

TOLERANCE = 2e-5  # the files allow 1e-4


@pytest.mark.parametrize(
    ("name", "scale", "shift"),
    [("sd/sd1_vae", SD_SCALE, 0.0), ("sdxl/sdxl_vae", SDXL_SCALE, 0.0), ("sd3/sd3_vae", 1.5305, 0.0609)],
)
def test_encoder_and_decoder(tmp_path, name, scale, shift):
    golden = load_golden(f"{name}.safetensors")
    sizes = golden.about["config"]
    assert (sizes["scale_factor"], sizes.get("shift_factor", 0.0)) == (scale, shift)
    groups, channels = sizes["norm_num_groups"], sizes.get("z_channels", 4)
    vae = loaded_vae(golden, tmp_path, groups=groups, channels=channels, scale=scale, shift=shift)
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
        assert relative_error(vae.scaled(sample), outputs["scaled"]) < TOLERANCE
        decoded = vae.decode(golden.inputs[f"{case}/scaled_latents_to_decode"])
        assert relative_error(decoded, outputs["decoded"]) < TOLERANCE
        if "decoded_u8" in outputs:
            levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
            assert (levels - outputs["decoded_u8"].float()).abs().max() <= 1
