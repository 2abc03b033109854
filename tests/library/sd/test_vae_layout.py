from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.sd.layout import SD_SCALE
from library.sd.vae import load_vae
from library.sd.vae_layout import DIFFUSERS, ORIGINAL, VaeConfig, VaePlace, find_vae, module_shapes, vae_part
from tests.library.sd.vae_files import HEADER, TINY, TINY_16, file_tensors_of, module_tensors_of, write_vae, write_vae_folder


def part_of(path: Path, *, prefix: str = "", layout: str = ORIGINAL, channels: int = 4):
    return vae_part(open_weights(path, flag="--vae"), prefix=prefix, layout=layout, channels=channels)


def test_names_are_those_of_diffusers_module():
    from library.sd.vae import StableDiffusionVae

    for config in (TINY, TINY_16, VaeConfig(), VaeConfig(latent_channels=16, quant=False)):
        with torch.device("meta"):
            module = StableDiffusionVae(config, scale=1.0).model
        assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == module_shapes(config)


@pytest.mark.parametrize("config", [TINY, TINY_16], ids=["4", "16"])
@pytest.mark.parametrize(
    ("layout", "prefix", "is_old"),
    [(ORIGINAL, "first_stage_model.", False), (ORIGINAL, "", False), (DIFFUSERS, "", False), (DIFFUSERS, "vae.", True)],
)
def test_every_layout_gives_the_same_weights(tmp_path, layout, prefix, is_old, config):
    path = write_vae(tmp_path / "vae.safetensors", layout, prefix=prefix, is_old=is_old, config=config)
    assert find_vae(open_weights(path, flag="--vae").shapes) == VaePlace(prefix, layout)
    part = part_of(path, prefix=prefix, layout=layout, channels=config.latent_channels)
    assert part.config == config
    vae = load_vae(part, device="cpu", dtype=torch.float32, scale=SD_SCALE)
    state = vae.model.state_dict()
    for name, tensor in module_tensors_of(config).items():
        assert torch.equal(state[name], tensor), name


def test_a_pickle_is_read(tmp_path):
    torch.save({"state_dict": file_tensors_of(ORIGINAL)}, tmp_path / "vae.ckpt")
    with pytest.raises(CheckpointError, match="norm groups"):  # it has no header that could tell them
        part_of(tmp_path / "vae.ckpt")


def test_keys_of_the_coders_own_training_are_left_out(tmp_path):
    extra = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_safetensors(tmp_path / "vae.safetensors", {**file_tensors_of(ORIGINAL), **extra}, HEADER)
    part = part_of(tmp_path / "vae.safetensors")
    assert not any(piece.key.startswith(("loss.", "model_ema.")) for piece in part.pieces.values())


def test_missing_unexpected_and_misshapen_keys_are_told_together(tmp_path):
    tensors = file_tensors_of(ORIGINAL)
    del tensors["encoder.mid.attn_1.q.bias"]
    tensors["decoder.extra.weight"] = torch.zeros(1)
    tensors["quant_conv.bias"] = torch.zeros(3)
    save_safetensors(tmp_path / "vae.safetensors", tensors, HEADER)
    with pytest.raises(CheckpointError) as error:
        part_of(tmp_path / "vae.safetensors")
    (text,) = error.value.problems
    for part in (
        "1 missing: encoder.mid.attn_1.q.bias",
        "1 unexpected: decoder.extra.weight",
        "quant_conv.bias (3 instead of 8)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        (
            TINY_16,
            4,
            r"VAE of 16 latent channels \(it is a VAE of SD3, FLUX or Lumina\); Stable Diffusion 1.x, .* need one of 4$",
        ),
        (TINY, 16, r"VAE of 4 latent channels \(it is a Stable Diffusion VAE\); SD3 and Lumina need one of 16$"),
        (replace(TINY, latent_channels=32), 16, "VAE of 32 latent channels; SD3 and Lumina need one of 16$"),
    ],
)
def test_a_vae_of_other_channels_is_another_models(tmp_path, config, wanted, message):
    path = write_vae(tmp_path / "vae.safetensors", config=config)
    with pytest.raises(CheckpointError, match=message):
        part_of(path, channels=wanted)


def test_a_coder_of_four_channels_without_its_quant_convolutions_is_not_complete(tmp_path):
    path = write_vae(tmp_path / "vae.safetensors", config=replace(TINY, quant=False))
    with pytest.raises(CheckpointError, match="4 missing: quant_conv.weight"):
        part_of(path)


def test_a_coder_of_sixteen_channels_may_have_quant_convolutions(tmp_path):
    config = replace(TINY, latent_channels=16)
    assert part_of(write_vae(tmp_path / "vae.safetensors", config=config), channels=16).config == config


def test_a_coder_of_another_stride_is_refused(tmp_path):
    path = write_vae(tmp_path / "upscaler.safetensors", config=VaeConfig(widths=(4, 8, 8), blocks=1))
    with pytest.raises(CheckpointError, match="one latent of 4 pixels"):
        part_of(path)


def test_another_model_is_named(tmp_path):
    save_safetensors(tmp_path / "wan.safetensors", {"encoder.middle.0.residual.0.gamma": torch.zeros(4, 1, 1, 1)})
    with pytest.raises(CheckpointError, match="it is a Qwen-Image VAE"):
        part_of(tmp_path / "wan.safetensors")
    save_safetensors(tmp_path / "other.safetensors", {"weight": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="none of its keys"):
        part_of(tmp_path / "other.safetensors")


def test_norm_groups_that_cannot_be_are_told(tmp_path):
    save_safetensors(tmp_path / "vae.safetensors", file_tensors_of(ORIGINAL))
    with pytest.raises(CheckpointError, match="4 channels, which 32 norm groups do not divide"):
        part_of(tmp_path / "vae.safetensors")
    bad = {"config": json.dumps({"vae": {"norm_groups": 0}})}
    save_safetensors(tmp_path / "bad.safetensors", file_tensors_of(ORIGINAL), bad)
    with pytest.raises(CheckpointError, match="norm_groups = 0; give a positive number"):
        part_of(tmp_path / "bad.safetensors")


def test_a_folders_config_gives_groups_and_scale(tmp_path):
    path = write_vae_folder(tmp_path / "vae", scaling_factor=0.5)
    config = part_of(path, layout=DIFFUSERS).config
    assert (config.norm_groups, config.scale) == (TINY.norm_groups, 0.5)


def test_a_folders_config_gives_shift_and_quant_convolutions(tmp_path):
    settings = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False}
    path = write_vae_folder(tmp_path / "vae", model=TINY_16, **settings)
    assert part_of(path, layout=DIFFUSERS, channels=16).config == replace(TINY_16, scale=0.3611, shift=0.1159)
    path = write_vae_folder(tmp_path / "damaged", model=TINY_16, **{**settings, "use_quant_conv": True})
    with pytest.raises(CheckpointError, match="4 missing: quant_conv.weight"):
        part_of(path, layout=DIFFUSERS, channels=16)
    for value in ("much", True):
        path = write_vae_folder(tmp_path / "bad", model=TINY_16, shift_factor=value)
        with pytest.raises(CheckpointError, match=f"shift_factor = {value!r}; give a number"):
            part_of(path, layout=DIFFUSERS, channels=16)


def test_the_header_of_a_file_of_one_model_may_say_it_without_a_name(tmp_path):
    settings = {"norm_groups": TINY.norm_groups, "shift_factor": 0.5}
    save_safetensors(tmp_path / "vae.safetensors", file_tensors_of(ORIGINAL), {"config": json.dumps(settings)})
    assert part_of(tmp_path / "vae.safetensors").config == replace(TINY, shift=0.5)


def test_a_config_beside_a_file_of_several_models_does_not_count(tmp_path):
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 9, "norm_num_groups": TINY.norm_groups}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_safetensors(tmp_path / "vae.safetensors", file_tensors_of(ORIGINAL))
    assert part_of(tmp_path / "vae.safetensors").config.scale == 9
    prefix = "first_stage_model."
    whole = {f"{prefix}{key}": tensor for key, tensor in file_tensors_of(ORIGINAL).items()}
    save_safetensors(tmp_path / "whole.safetensors", whole, HEADER)
    assert part_of(tmp_path / "whole.safetensors", prefix=prefix).config == TINY
    save_safetensors(tmp_path / "whole.safetensors", whole)
    with pytest.raises(CheckpointError, match="32 norm groups do not divide"):
        part_of(tmp_path / "whole.safetensors", prefix=prefix)


def test_the_config_of_another_model_beside_the_file_does_not_count(tmp_path):
    path = write_vae(tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet", "scaling_factor": 9}), encoding="utf-8")
    assert part_of(path).config == TINY
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert part_of(path).config == TINY  # the header already says what there is to know


@pytest.mark.parametrize(
    ("name", "prefix", "channels"),
    [
        ("sd15", "first_stage_model.", 4),
        ("sd21", "first_stage_model.", 4),
        ("sdxl_base", "first_stage_model.", 4),
        ("sd3_medium", "first_stage_model.", 16),
        ("sd3_vae", "", 16),
        ("flux_ae", "", 16),
    ],
)
def test_published_files_fit(name, prefix, channels):
    specs = Path(os.environ.get("SPECS_DIR", "")) / "checkpoints" / f"{name}.json.gz"
    if not os.environ.get("SPECS_DIR") or not specs.is_file():
        pytest.skip("the list of published keys is not here")
    entries = json.loads(gzip.decompress(specs.read_bytes()))["tensors"]
    source = ListedKeys({key: tuple(shape) for key, (_, shape) in entries.items()})
    part = vae_part(source, prefix=prefix, layout=ORIGINAL, channels=channels)
    assert part.config == VaeConfig(latent_channels=channels, quant=channels == 4)
    used = {piece.key for piece in part.pieces.values()}
    assert used == {key for key in entries if key.startswith(prefix)}


class ListedKeys:
    """A source of names and shapes alone."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes, self.path, self.metadata = shapes, Path("listed.safetensors"), {}

    def tensors(self, names):
        raise AssertionError("only looked at")
