"""What Stable Diffusion's and SDXL's caches of kohya-ss/sd-scripts mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.caches.latent_cache import LatentRecipe
from library.dataset.caches.reference_caches import reference_latents, reference_text
from library.dataset.caches.text_cache import TextRecipe
from library.dataset.items import Item, SubsetSettings
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.sd.architecture import STABLE_DIFFUSION
from library.sd.layout import StableDiffusionLayouts
from library.sdxl.architecture import SDXL

RAW = np.random.default_rng(0).normal(size=(4, 8, 12)).astype(np.float32)
KINDS = pytest.mark.parametrize(
    ("architecture", "options", "scale"),
    [(STABLE_DIFFUSION, StableDiffusionTrainOptions(), 0.18215), (SDXL, SdxlTrainOptions(), 0.13025)],
    ids=["sd", "sdxl"],
)


@pytest.fixture
def item(tmp_path: Path) -> Item:
    path = tmp_path / "a.png"
    Image.new("RGB", (100, 70)).save(path)
    settings = SubsetSettings(place="test", image_dir=tmp_path)
    return Item(index=0, key="0:0:a.png", path=path, caption="abc", dataset_index=0, subset=settings, repeats=1, size_wh=(100, 70),
                bucket_wh=(96, 64), resized_wh=(96, 67), crop_left_top=(0, 1))  # fmt: skip


@KINDS
def test_raw_latents_are_scaled(architecture, options, scale, item):
    np.savez(
        item.path.with_name(f"a_0100x0070_{architecture.name}.npz"),
        latents=RAW,
        original_size=[100, 70],
        crop_ltrb=[0, 0, 96, 64],
    )
    format = architecture.reference_format(StableDiffusionLayouts(), options)
    recipe = LatentRecipe(arch=architecture.name, vae_fingerprint="v", dtype="float32", channels=4)
    found = reference_latents(item, ("latents",), format=format, recipe=recipe)
    assert found.keys() == {"latents"}
    assert torch.allclose(found["latents"], torch.from_numpy(RAW) * scale, rtol=1e-6)


@KINDS
def test_the_files_of_another_family_are_not_looked_at(architecture, options, scale, item):
    other = {"sd": "sdxl", "sdxl": "sd"}[architecture.name]
    np.savez(item.path.with_name(f"a_0100x0070_{other}.npz"), latents=RAW, original_size=[100, 70], crop_ltrb=[0, 0, 96, 64])
    format = architecture.reference_format(StableDiffusionLayouts(), options)
    recipe = LatentRecipe(arch=architecture.name, vae_fingerprint="v", dtype="float32", channels=4)
    assert reference_latents(item, ("latents",), format=format, recipe=recipe) == ""


def test_encoded_text_is_not_taken_over(item):
    """A file does not say which text it is of, and its pooled vector may be wrong."""
    arrays = {"hidden_state1": np.zeros((77, 768)), "hidden_state2": np.zeros((77, 1280)), "pool2": np.zeros(1280)}
    np.savez(item.path.with_name("a_te_outputs.npz"), **arrays)
    format = SDXL.reference_format(StableDiffusionLayouts(), SdxlTrainOptions())
    recipe = TextRecipe(arch="sdxl", encoder_fingerprint="e", dtype="float32")
    assert "transposed projection" in str(reference_text(item, "abc", format=format, recipe=recipe))
