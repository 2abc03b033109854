"""diffusers loads what we write for it, and its pictures change as ours do: the same tiny weights, the same LoRA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from networks import lora_anima
from networks.anima_layouts import ANIMA_NAMES
from tests.library.anima.test_against_diffusers import their_adapter, their_dit, their_name
from tests.library.anima.tiny_dit import TINY, batch, tiny_denoiser, tiny_weights
from tests.networks.full_anima_lora import METADATA, randomize

diffusers = pytest.importorskip("diffusers", minversion="0.42")
pytest.importorskip("peft")

CONFIG = replace(TINY, width=48)  # diffusers' width is heads * head width
MODULES = 32 + 6 + 20  # of the blocks; embedders and final layer; the adapter's blocks


@pytest.fixture(scope="module")
def network():
    """On every module of a tiny denoiser that can be trained, with several ranks and strengths other than 1."""
    torch.manual_seed(0)
    denoiser = tiny_denoiser(CONFIG)
    made = lora_anima.create_network(1.0, 4, 3.0, None, None, denoiser, train_llm_adapter="true", include_patterns=".*",
                                     network_reg_dims=r".*mlp.*=2, .*cross_attn.*=6")  # fmt: skip
    made.apply_to(None, denoiser, False, True)
    randomize(made)
    assert len(made.loras) == MODULES
    made.denoiser_of_test = (denoiser,)  # in a tuple: it is no part of the network
    return made


@pytest.fixture
def pipeline():
    weights = tiny_weights(CONFIG)
    transformer, conditioner = their_dit(CONFIG), their_adapter(CONFIG)
    adapter = {name.removeprefix("llm_adapter."): value for name, value in weights.items() if name.startswith("llm_adapter.")}
    rest = {their_name(name): value for name, value in weights.items() if not name.startswith("llm_adapter.")}
    transformer.load_state_dict(rest, strict=True)
    conditioner.load_state_dict(adapter, strict=True)
    made = diffusers.AnimaAutoBlocks().init_pipeline()
    made.update_components(transformer=transformer, text_conditioner=conditioner)
    assert isinstance(made, diffusers.AnimaModularPipeline)
    return made


def text() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(2, 9, CONFIG.adapter.source_width, generator=generator)
    ids = torch.randint(0, CONFIG.adapter.vocabulary, (2, 7), generator=generator)
    qwen_mask, t5_mask = torch.ones(2, 9), torch.ones(2, 7)
    qwen_mask[1, 4:], t5_mask[1, 3:] = 0, 0
    return states, qwen_mask, ids, t5_mask


@torch.no_grad()
def our_output(denoiser) -> torch.Tensor:
    latents, sigmas, _ = batch(height=10, width=6)
    states, qwen_mask, ids, t5_mask = text()
    return denoiser(latents, sigmas, denoiser.encode_context(states, qwen_mask, ids, t5_mask), torch.zeros(2, 1, 10, 6))


@torch.no_grad()
def their_output(pipeline) -> torch.Tensor:
    latents, sigmas, _ = batch(height=10, width=6)
    states, qwen_mask, ids, t5_mask = text()
    context = pipeline.text_conditioner(states, ids, t5_mask, qwen_mask)
    masked = torch.cat((latents, torch.zeros(2, 1, 10, 6)), dim=1).unsqueeze(2)
    return pipeline.transformer(masked, sigmas, context).sample.squeeze(2)


def loaded_modules(pipeline) -> int:
    parts = (pipeline.transformer, pipeline.text_conditioner)
    return sum(hasattr(module, "lora_A") and len(module.lora_A) > 0 for part in parts for module in part.modules())


def assert_same_change(network, pipeline, file) -> None:
    (denoiser,) = network.denoiser_of_test
    theirs_before = their_output(pipeline)
    network.set_enabled(False)
    ours_before = our_output(denoiser)
    network.set_enabled(True)
    pipeline.load_lora_weights(str(file))
    assert loaded_modules(pipeline) == MODULES
    ours, theirs = our_output(denoiser) - ours_before, their_output(pipeline) - theirs_before
    assert (ours_before - theirs_before).abs().max() / ours_before.abs().max() < 3e-5
    assert ours.abs().max() / ours_before.abs().max() > 0.1  # the LoRA does something
    assert (ours - theirs).abs().max() / ours.abs().max() < 1e-4


def test_a_run_s_file_changes_diffusers_output_as_ours(network, pipeline, tmp_path):
    network.save_weights_as("diffusers", tmp_path / "a.safetensors", None, METADATA)
    assert_same_change(network, pipeline, tmp_path / "a.safetensors")


def test_each_module_alone_reaches_its_place(network, pipeline, tmp_path):
    """A wrong name would also show above; this says which one it is."""
    network.save_weights_as("diffusers", tmp_path / "a.safetensors", None, METADATA)
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    found = {}
    for part, model in (("transformer", pipeline.transformer), ("text_conditioner", pipeline.text_conditioner)):
        for path, module in model.named_modules():
            if hasattr(module, "lora_A"):
                found[f"{part}.{path}"] = module.get_delta_weight("default_0")
    keys = {lora.lora_name: ANIMA_NAMES.find(f"{lora.lora_name}.alpha").name("diffusers") for lora in network.loras}
    assert set(found) == set(keys.values())
    for lora in network.loras:
        wanted = lora.scale * lora.lora_up.weight @ lora.lora_down.weight
        torch.testing.assert_close(found[keys[lora.lora_name]], wanted, rtol=1e-5, atol=1e-5)
