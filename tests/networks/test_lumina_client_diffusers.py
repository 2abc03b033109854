"""diffusers loads what we write for it, and its model changes as ours does: the same tiny weights, the same LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from library.errors import CheckpointError
from library.files.safetensors_file import read_header, read_tensors
from networks import lora_lumina
from networks.lumina_layouts import LUMINA_NAMES
from tests.library.lumina.test_against_diffusers import CONFIG, their_nextdit
from tests.library.lumina.tiny_nextdit import batch, tiny_denoiser
from tests.networks.lumina_models import gemma, randomize

diffusers = pytest.importorskip("diffusers", minversion="0.35")
pytest.importorskip("peft")

EVERYTHING = {"embedder_dims": "3,4,5", "mlp_dim": "2", "mod_dim": "6"}
SPLIT = {**EVERYTHING, "split_qkv": "true"}
LINEARS = 2 * 5 + (2 + 2) * 6 + 2 + 4  # ours: two context refiners, two noise refiners and two layers, the ends, the embedders
THEIRS = LINEARS + 2 * 6  # q, k and v of each block for one qkv
LENGTHS = (7, 3)


def network_of(arguments: dict[str, str]):
    torch.manual_seed(0)
    denoiser = tiny_denoiser(CONFIG)
    network = lora_lumina.create_network(1.0, 4, 3.0, None, None, denoiser, **arguments)
    network.apply_to(None, denoiser, False, True)
    randomize(network)
    return denoiser, network


@pytest.fixture
def pipeline():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.Lumina2Pipeline(their_nextdit(), scheduler, vae=None, text_encoder=None, tokenizer=None)


@torch.no_grad()
def our_output(denoiser) -> Tensor:
    latents, times, states, lengths = batch(LENGTHS)
    return denoiser(latents, times, states, lengths)


@torch.no_grad()
def their_output(pipeline) -> Tensor:
    latents, times, states, lengths = batch(LENGTHS)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pipeline.transformer(latents, times, states, mask, return_dict=False)[0]


def loaded(pipeline) -> dict[str, Tensor]:
    """What each of diffusers' layers got."""
    modules = pipeline.transformer.named_modules()
    return {path: module.get_delta_weight("default_0") for path, module in modules if hasattr(module, "lora_A")}


@pytest.mark.parametrize("arguments", [{}, EVERYTHING, SPLIT], ids=["default", "everything", "split_qkv"])
def test_a_saved_file_changes_diffusers_output_as_ours(arguments, pipeline, tmp_path):
    denoiser, network = network_of(arguments)
    network.save_weights_as("diffusers", tmp_path / "a.safetensors", None, {"ss_steps": "1"})
    theirs_before, ours = their_output(pipeline), our_output(denoiser)
    network.set_enabled(False)
    ours_before = our_output(denoiser)
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert len(loaded(pipeline)) == (THEIRS if arguments else THEIRS - 4)
    change, their_change = ours - ours_before, their_output(pipeline) - theirs_before
    assert (ours_before - theirs_before).abs().max() / ours_before.abs().max() < 3e-5
    assert change.abs().max() / ours_before.abs().max() > 0.1  # the LoRA does something
    assert (change - their_change).abs().max() / change.abs().max() < 1e-4


@pytest.mark.parametrize("arguments", [EVERYTHING, SPLIT], ids=["fused", "split_qkv"])
def test_each_module_alone_reaches_its_place(arguments, pipeline, tmp_path):
    """A wrong name would also show above; this says which one it is."""
    _, network = network_of(arguments)
    network.save_weights_as("diffusers", tmp_path / "a.safetensors", None, {})
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    found = loaded(pipeline)
    assert len(found) == THEIRS
    for name, parts in pairs_of(network).items():
        key = LUMINA_NAMES.find(f"{name}.alpha")
        assert key is not None
        rows = [found.pop(theirs.removeprefix("transformer.")) for theirs in key.all_names("diffusers")]
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        wanted = float(parts["alpha"]) / len(down) * up @ down
        torch.testing.assert_close(torch.cat(rows), wanted, rtol=1e-5, atol=1e-5)
    assert not found


def pairs_of(network) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in network.file_tensors().items():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = tensor
    return found


@pytest.mark.parametrize("arguments", [EVERYTHING, SPLIT], ids=["fused", "split_qkv"])
def test_the_file_is_read_back(arguments, tmp_path):
    denoiser, network = network_of(arguments)
    network.save_weights_as("diffusers", tmp_path / "a.safetensors", None, {})
    keys = read_header(tmp_path / "a.safetensors").tensors
    assert not any(key.endswith(".alpha") for key in keys) and all(key.startswith("transformer.") for key in keys)
    wanted = our_output(denoiser)
    other = tiny_denoiser(CONFIG)
    again, weights = lora_lumina.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, other)
    assert len(again.loras) == LINEARS
    again.merge_to(None, other, weights)
    torch.testing.assert_close(our_output(other), wanted, rtol=1e-3, atol=1e-4)


def test_what_diffusers_own_training_saves_is_read(tmp_path):
    """Attention alone, with pairs of their own for q, k and v."""
    transformer = their_nextdit()
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    layers = get_peft_model_state_dict(transformer)
    diffusers.Lumina2Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name="a.safetensors")
    denoiser = tiny_denoiser(CONFIG)
    network, weights = lora_lumina.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, denoiser)
    assert {made.lora_name.rpartition("_")[2] for made in network.loras} == {"qkv"} and len(network.loras) == 6
    network.merge_to(None, denoiser, weights)
    latents, times, states, lengths = batch(LENGTHS)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        theirs = transformer(latents, times, states, mask, return_dict=False)[0]
    assert (our_output(denoiser) - theirs).abs().max() / theirs.abs().max() < 1e-4


def test_the_text_encoder_has_no_place_there(tmp_path):
    encoder = gemma()
    network = lora_lumina.create_network(1.0, 4, 3.0, None, encoder, None)
    network.apply_to(encoder, None, True, False)
    (problem,) = network.layout_problems("diffusers")
    assert "that layout has no place for 14 of its modules (lora_te_layers_0_mlp_down_proj" in problem
    with pytest.raises(CheckpointError, match="diffusers' loader has no place for 14 modules of the text encoder"):
        network.save_weights_as("diffusers", tmp_path / "a.safetensors", None, {})


def test_why_diffusers_has_a_layout_of_its_own(pipeline, tmp_path):
    """If this fails, diffusers has learnt to take the checkpoint's names of every part, or sizes other than the published."""
    _, network = network_of({})
    network.save_weights_as("comfy", tmp_path / "a.safetensors", None, {})
    without_alpha = {key: t for key, t in read_tensors(read_header(tmp_path / "a.safetensors")) if not key.endswith(".alpha")}
    with pytest.raises((ValueError, RuntimeError)):
        pipeline.load_lora_weights(without_alpha)
