"""What SDXL asks of its models beyond Stable Diffusion's checks (tests/library/sd/test_architecture.py has what both share)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from library.errors import CheckpointError
from library.options.sd import SdxlTrainOptions
from library.sdxl.architecture import SDXL
from tools.tiny_sd import make_sd


def options_for(path: Path, **groups):
    options = SdxlTrainOptions()
    groups["model"] = {"pretrained_model_name_or_path": str(path), **groups.get("model", {})}
    return replace(options, **{name: replace(getattr(options, name), **values) for name, values in groups.items()})


def test_buckets_are_finer_than_stable_diffusions(tiny_sd):
    layouts = SDXL.read_layouts(options_for(tiny_sd["sdxl"]))
    halvings = len(layouts.denoiser.config.widths) - 1
    assert SDXL.bucket_step == 8 * 2**halvings == 32
    assert SDXL.name == "sdxl" and SDXL.scale_of(layouts) == 0.13025


def test_the_scale_that_a_vaes_config_says_counts(tiny_sd):
    layouts = SDXL.read_layouts(options_for(tiny_sd["sdxl"], model={"vae": str(tiny_sd["vae_folder"])}))
    assert SDXL.scale_of(layouts) == 0.18215


def test_a_pooled_vector_of_another_width_is_told(tiny_sd, tmp_path):
    """Of a folder put together from two models: the text encoder of Stable Diffusion 1 has no projection."""
    folder = shutil.copytree(tiny_sd["sdxl_folder"], tmp_path / "mixed")
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    with pytest.raises(CheckpointError) as caught:
        SDXL.read_layouts(options_for(folder))
    assert len(caught.value.problems) == 2
    assert "its U-Net takes a pooled text of 48 values, its second text encoder gives none" in caught.value.problems[1]


def test_a_missing_encoder_is_named(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd["sdxl_folder"], tmp_path / "half")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(CheckpointError, match="half/text_encoder_2 is not there"):
        SDXL.read_layouts(options_for(folder))


def test_clip_skip_beyond_the_layers_is_taken_as_it_is_for_the_metadata_only(tiny_sd):
    assert SDXL.read_layouts(options_for(tiny_sd["sdxl"], clip={"clip_skip": 99})).text


def test_a_deep_model_is_read_as_it_is(tmp_path):
    path = make_sd(tmp_path, "sdxl", size="deep")["file"]
    config = SDXL.read_layouts(options_for(path), {"denoiser"}).denoiser.config
    assert config.depths == (0, 2, 10) and config.middle_depth == 10
