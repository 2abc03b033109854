"""--base_weights that change the text encoder: in what is cached, and in what is encoded at every step."""

from __future__ import annotations

import pytest
import torch

from library.dataset.caches.text_cache import TextRecipe
from library.files.safetensors_file import save_safetensors
from library.options.network import NetworkOptions
from library.training.models.base_weights import text_base_weights, with_base_weights
from tests.tiny_runs import same_tensors
from tests.trainer_runs import CACHED_IN_MEMORY, Runs

RECIPE = TextRecipe(arch="a", encoder_fingerprint="0", dtype="float32", settings={"tokens": 512})


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("lora_te_layers_0_mlp_up_proj.alpha", True),
        ("text_encoders.qwen3_06b.transformer.model.layers.0.mlp.up_proj.lora_A.weight", True),
        ("lora_unet_blocks_0_mlp_layer1.alpha", False),
        ("diffusion_model.llm_adapter.blocks.0.mlp.0.lora_A.weight", False),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_files_that_change_the_text_encoder(tmp_path, key, changes, ending):
    file = tmp_path / f"style.{ending}"
    tensors = {key: torch.ones(1)}
    save_safetensors(file, tensors, {}) if ending == "safetensors" else torch.save(tensors, file)
    options = NetworkOptions(base_weights=[str(file)], base_weights_multiplier=[0.5])
    assert text_base_weights(options) == ([(str(file), 0.5)] if changes else [])
    recipe = with_base_weights(RECIPE, options)
    assert (recipe.settings != RECIPE.settings) == changes and recipe.settings["tokens"] == 512
    assert (with_base_weights(RECIPE, NetworkOptions(base_weights=[str(file)])).settings == recipe.settings) == (not changes)


@pytest.fixture
def runs(tiny_anima, picture_folder, tmp_path) -> Runs:
    return Runs("anima", tmp_path, tiny_anima, picture_folder(3))


def test_cached_and_live_texts_are_those_of_the_merged_encoder(runs):
    runs.train("--cache_latents", "--max_train_steps=2", "--learning_rate=0.1", output="first")
    merged = ("--max_train_steps=2", "--network_train_unet_only", f"--base_weights={runs.folder / 'first' / 'tiny.safetensors'}")
    runs.train("--cache_latents", *merged, output="live")
    runs.train(*CACHED_IN_MEMORY, *merged, output="cached")
    assert same_tensors(runs.lora("live"), runs.lora("cached"))
    runs.train(*CACHED_IN_MEMORY, "--cache_text_encoder_outputs_to_disk", *merged[:2], output="plain")
    again = runs.checked(*CACHED_IN_MEMORY, "--cache_text_encoder_outputs_to_disk", *merged)
    assert again.text_cache.state().valid == 0  # the plain encoder's are of no use
