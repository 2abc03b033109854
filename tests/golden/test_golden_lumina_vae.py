from __future__ import annotations

from library.sd.vae import posterior_sample
from tests.golden.golden_files import load_golden, relative_error
from tests.golden.vae_of_golden import loaded_vae

TOLERANCE = 3e-5  # the file allows 1e-4
SCALE, SHIFT = 0.3611, 0.1159


def test_encoder_decoder_and_pictures(tmp_path):
    golden = load_golden("lumina/flux_ae.safetensors")
    sizes = golden.about["config"]
    assert (sizes["scale_factor"], sizes["shift_factor"]) == (SCALE, SHIFT)
    vae = loaded_vae(golden, tmp_path, groups=sizes["group_norm_groups"], channels=16, scale=SCALE, shift=SHIFT)
    cases = {key.split("/")[0] for key in golden.inputs}
    assert cases
    for case in cases:
        outputs = {key.removeprefix(f"{case}/"): value for key, value in golden.outputs.items() if key.startswith(f"{case}/")}
        moments = vae.moments(golden.inputs[f"{case}/pixels"])
        mean, log_variance = moments.chunk(2, dim=1)
        assert relative_error(mean, outputs["posterior_mean"]) < TOLERANCE
        assert relative_error(log_variance, outputs["posterior_logvar"]) < TOLERANCE
        assert relative_error(vae.scaled(mean), outputs["latents_from_mean"]) < TOLERANCE
        sample = posterior_sample(moments, golden.inputs[f"{case}/posterior_noise"])
        assert relative_error(vae.scaled(sample), outputs["trainer_latents"]) < TOLERANCE
        decoded = vae.decode(golden.inputs[f"{case}/scaled_latents"])
        assert relative_error(decoded, outputs["decode"]) < TOLERANCE
        levels = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)  # (B, H, W, 3)
        assert (levels.round() - outputs["image_uint8_single_unscale"].float()).abs().max() <= 1
