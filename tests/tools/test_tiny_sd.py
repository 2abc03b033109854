"""Tiny Stable Diffusion checkpoints: the published names, equal bytes for equal arguments, live weights, loadable by diffusers."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch

from library.errors import OptionError
from library.files.open_weights import open_weights
from library.files.safetensors_file import read_header
from tools.make_tiny_models import _made, _parser, main
from tools.tiny_sd import LAYOUTS, make_sd
from tools.tiny_sd_models import MODELS

SPECS = Path(os.environ.get("SPECS_DIR", "specs")) / "checkpoints"
PUBLISHED = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl_base"}


def weights(path: Path) -> dict[str, torch.Tensor]:
    source = open_weights(path, flag="--model")
    return dict(source.tensors(source.shapes))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_names_and_sides_are_those_of_the_published_files(kind, tmp_path):
    """Of the text encoders the first layer stands for the others, of which tiny ones have fewer."""
    if not (SPECS / f"{PUBLISHED[kind]}.json.gz").is_file():
        pytest.skip("the published names are not here")
    published = json.loads(gzip.decompress((SPECS / f"{PUBLISHED[kind]}.json.gz").read_bytes()))["tensors"]
    size = "deep" if kind == "sdxl" else "tiny"
    own = read_header(make_sd(tmp_path, kind, size=size)["file"]).tensors

    def comparable(names):
        tables = re.compile(r"[a-z_0-9]+")  # of noise; files have more or fewer of them
        later = re.compile(r".*(text_model\.encoder\.layers|transformer\.resblocks)\.[1-9]")
        return {name for name in names if not tables.fullmatch(name) and not later.match(name)}

    assert comparable(own) == comparable(published)
    assert all(len(info.shape) == len(published[name][1]) for name, info in own.items() if name in comparable(own))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_equal_arguments_give_equal_bytes_and_live_weights(kind, tiny_sd, tmp_path):
    again = make_sd(tmp_path / "again", kind)["file"]
    assert again.read_bytes() == tiny_sd[kind].read_bytes() and again.stat().st_size < 30e6
    assert make_sd(tmp_path / "other", kind, seed=1)["file"].read_bytes() != again.read_bytes()
    for name, tensor in weights(again).items():
        assert tensor.isfinite().all() and tensor.float().abs().max() > 0, name


def test_every_layout_has_the_same_weights(tmp_path):
    paths = make_sd(tmp_path, "sd1", layouts=LAYOUTS, v_prediction=True)
    file, pickle = weights(paths["file"]), weights(paths["ckpt"])
    assert file.keys() == pickle.keys() and all(torch.equal(file[name], pickle[name]) for name in file)
    assert {"v_pred", "ztsnr", "betas"} <= set(file)
    vae = {f"first_stage_model.{name}": tensor for name, tensor in weights(paths["vae"]).items()}
    assert all(torch.equal(file[name], tensor) for name, tensor in vae.items())
    unet = weights(paths["folder"] / "unet")
    assert torch.equal(unet["conv_in.weight"], file["model.diffusion_model.input_blocks.0.0.weight"])
    assert weights(paths["folder"] / "vae").keys() == weights(paths["vae_diffusers"]).keys()
    assert json.loads((paths["folder"] / "scheduler" / "scheduler_config.json").read_text())["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_folders_models_are_loaded_and_run_by_diffusers(kind, tiny_sd):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder, model = tiny_sd[f"{kind}_folder"], MODELS[kind]["tiny"]()
    unet, problems = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not any(problems.values())
    extra = {}
    if kind == "sdxl":
        width = model.unet.vector_width - 6 * 256
        extra = {"added_cond_kwargs": {"text_embeds": torch.randn(1, width), "time_ids": torch.zeros(1, 6)}}
    with torch.no_grad():
        found = unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 77, model.unet.context_width), **extra).sample
    assert found.isfinite().all() and 0.1 < float(found.std()) < 3
    vae, problems = AutoencoderKL.from_pretrained(folder / "vae", output_loading_info=True)
    assert not any(problems.values())
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist
        scaled = latents.mean * vae.config.scaling_factor
        assert 0.2 < float(scaled.std()) < 3 and float(latents.std.mean()) < 0.2
        assert float(vae.decode(latents.mean).sample.abs().mean()) < 1.5


@pytest.mark.parametrize("folder", ["sd1_folder/text_encoder", "sdxl_folder/text_encoder", "sdxl_folder/text_encoder_2"])
def test_the_folders_encoders_are_loaded_and_run_by_transformers(folder, tiny_sd):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    role, _, part = folder.partition("/")
    kind = CLIPTextModelWithProjection if part.endswith("2") else CLIPTextModel
    encoder, problems = kind.from_pretrained(tiny_sd[role] / part, output_loading_info=True)
    assert not any(problems.values())
    with torch.no_grad():
        states = encoder(torch.tensor([[49406, 320, 2368, 49407]])).last_hidden_state
    assert states.isfinite().all() and float(states.std()) > 0.3


def test_as_a_command(tmp_path, capsys):
    main([str(tmp_path), "--model", "sd2", "--layouts", "file", "vae", "--dtype", "bf16"])
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["file", "vae"]
    assert {info.dtype for info in read_header(tmp_path / "vae_sd2_tiny.safetensors").tensors.values()} == {"BF16"}


@pytest.mark.parametrize(
    "words", [["--size", "deep"], ["--model", "anima", "--dtype", "fp16"], ["--model", "sd1", "--size", "x"]]
)
def test_a_size_or_format_that_is_not_there(words, tmp_path):
    with pytest.raises(OptionError, match=f"{words[-2]} {words[-1]} is not there for (anima|sd1): give one of"):
        _made(_parser().parse_args([str(tmp_path), *words]))
