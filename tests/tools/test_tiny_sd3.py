"""Tiny SD3 checkpoints: the published names and sides, equal bytes for equal arguments, live weights, equal parts in all files."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch

from library.files.open_weights import open_weights
from library.files.safetensors_file import read_header, read_tensors
from library.sd.vae import load_vae
from library.sd.vae_layout import find_vae, vae_part
from library.sd3.checkpoint import build_denoiser, load_denoiser
from library.sd3.layout import mmdit_part
from tests.golden.golden_files import relative_error
from tools.make_tiny_models import main
from tools.tiny_sd3 import FILES, KINDS, LATENT_CHANNELS, PREFIXES, SCALE, SHIFT, make_sd3

SPECS = Path(os.environ.get("SPECS_DIR", "specs")) / "checkpoints"
PUBLISHED = {
    ("sd3", "model"): "sd3_medium",
    ("sd35_medium", "model"): "sd35_medium",
    ("sd35_large", "model"): "sd35_large",
    ("sd3", "vae"): "sd3_vae",
    ("sd3", "clip_l"): "clip_l",
    ("sd3", "clip_g"): "clip_g",
    ("sd3", "t5xxl"): "t5xxl",
}
LAST_BLOCK = {"sd3": 23, "sd35_medium": 23, "sd35_large": 37}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(read_header(path)))


def comparable(names, *, last: int) -> dict[str, str]:
    """Name with blocks as first, last or between -> name. Files have more layers of text encoders, and may lack what we have."""

    def place(match: re.Match) -> str:
        number = int(match[1])
        return f"joint_blocks.{'first' if number == 0 else 'last' if number == last else 'between'}."

    ignored = re.compile(r"logit_scale|encoder\.embed_tokens\.weight|.*(encoder\.layers|encoder\.block)\.[1-9]")
    return {re.sub(r"joint_blocks\.(\d+)\.", place, name): name for name in names if not ignored.match(name)}


@pytest.mark.parametrize(("kind", "file"), PUBLISHED)
def test_names_and_sides_are_those_of_the_published_files(kind, file, tiny_sd3):
    path = SPECS / f"{PUBLISHED[kind, file]}.json.gz"
    if not path.is_file():
        pytest.skip("the published names are not here")
    published = json.loads(gzip.decompress(path.read_bytes()))["tensors"]
    if kind == "sd35_medium":  # whose blocks up to number 12 have a second attention, here only the first
        second = re.compile(r".*joint_blocks\.([1-9]|1[0-2])\.x_block\.attn2")
        published = {name: entry for name, entry in published.items() if not second.match(name)}
    own = {name: info.shape for name, info in read_header(tiny_sd3[kind if file == "model" else file]).tensors.items()}
    theirs, ours = comparable(published, last=LAST_BLOCK[kind]), comparable(own, last=2)
    assert set(theirs) == set(ours)
    assert all(len(own[ours[name]]) == len(published[theirs[name]][1]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_arguments_give_equal_bytes_and_live_weights(kind, tiny_sd3, tmp_path):
    again = make_sd3(tmp_path / "again", kind, files=["whole"])["whole"]
    assert again.read_bytes() == tiny_sd3[f"{kind}_whole"].read_bytes() and again.stat().st_size < 15e6
    assert make_sd3(tmp_path / "other", kind, seed=1, files=["whole"])["whole"].read_bytes() != again.read_bytes()
    for name, tensor in weights(again).items():
        assert tensor.isfinite().all() and tensor.float().abs().max() > 0, name


def test_a_part_is_the_same_in_every_file(tiny_sd3):
    whole, model, clips = (weights(tiny_sd3[name]) for name in ("sd3_whole", "sd3", "sd3_clips"))
    for file, parts in FILES.items():
        if len(parts) == 1:
            own = {PREFIXES[parts[0]] + name: tensor for name, tensor in weights(tiny_sd3[file]).items()}
            assert all(torch.equal(whole[name], tensor) for name, tensor in own.items())
            whole = {name: tensor for name, tensor in whole.items() if name not in own}
            model = {name: tensor for name, tensor in model.items() if name not in own}
    assert whole.keys() == model.keys()
    assert set(clips) == {name for name in weights(tiny_sd3["sd3_whole"]) if "t5xxl" not in name}


@pytest.mark.parametrize(("kind", "name"), {"sd3": "medium", "sd35_medium": "5-medium", "sd35_large": "5-large"}.items())
def test_the_denoiser_is_of_its_kind(kind, name, tiny_sd3):
    config = mmdit_part(open_weights(tiny_sd3[kind], flag="--x"), prefix=PREFIXES["mmdit"]).config
    assert (config.kind, config.width, config.blocks, config.heads) == (name, 128, 3, 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_denoiser_runs_on_what_the_encoders_give(kind, tiny_sd3):
    """With every layer alive: the prediction is about as large as its target, and differs with each of the inputs."""
    part = mmdit_part(open_weights(tiny_sd3[kind], flag="--x"), prefix=PREFIXES["mmdit"])
    denoiser = build_denoiser(part.config)
    load_denoiser(denoiser, part, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (1, 16, 16, 16), "context": (1, 100, part.config.context_width), "pooled": (1, part.config.pooled_width)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["timesteps"] = torch.tensor([500.0])
    found = denoiser(**inputs)
    assert found.isfinite().all() and 0.3 < float(found.std()) < 3
    for name, tensor in inputs.items():
        change = tensor / 2 if name == "timesteps" else torch.randn(tensor.shape, generator=generator)
        other = denoiser(**{**inputs, name: change})
        assert float((other - found).std()) > 0.05 * float(found.std()), name


@torch.no_grad()
def test_latents_vary_by_one_and_colours_are_colours(tiny_sd3):
    source = open_weights(tiny_sd3["sd3"], flag="--x")
    place = find_vae(source.shapes)
    vae = load_vae(
        vae_part(source, prefix=place.prefix, layout=place.layout, channels=LATENT_CHANNELS),
        device="cpu",
        dtype=torch.float32,
        scale=SCALE,
        shift=SHIFT,
    )
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(pixels, [1, 2])
    assert latents.shape == (2, 16, 8, 8) and 0.3 < float(latents.std()) < 3
    assert relative_error(vae.encode(pixels, [3, 4]), latents) < 0.3  # narrow posteriors
    assert 0.1 < float(vae.decode(latents).abs().mean()) < 1.5


def test_the_position_table_is_that_of_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    from tools.tiny_sd3 import position_table

    theirs = get_2d_sincos_pos_embed(16, 12, base_size=4, output_type="pt")  # as PatchEmbed asks for 192 of 64
    assert torch.allclose(position_table(12, 16)[0], theirs.float(), atol=1e-5)


def test_as_a_command(tmp_path, capsys):
    main([str(tmp_path), "--model", "sd35_large", "--dtype", "bf16"])
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(FILES)
    header = read_header(tmp_path / "sd35_large_tiny_incl_clips_t5xxl.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {"BF16"}
    assert json.loads(header.metadata["config"])["clip_g"] == {"heads": 3, "activation": "gelu"}
