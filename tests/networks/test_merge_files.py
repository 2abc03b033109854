"""LoRA files merged into models with several text encoders, by our own reader and by the LyCORIS package."""

from __future__ import annotations

import copy

import pytest
import torch

from library.errors import NetworkError
from networks import lora
from networks.merge_files import ModulePatterns, bare_tree, planned_merges
from tests.networks.sd_models import randomize, text_encoders_of, unet_of

pytest.importorskip("diffusers")
CPU = torch.device("cpu")


@pytest.fixture
def models():
    torch.manual_seed(0)
    return text_encoders_of("sdxl", tiny=True), unet_of("sdxl", tiny=True)


@pytest.fixture
def file(models, tmp_path):
    encoders, unet = copy.deepcopy(models)
    network = lora.create_network(1.0, 2, 4.0, None, encoders, unet, conv_dim="3")
    network.apply_to(encoders, unet)
    randomize(network)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    return str(tmp_path / "a.safetensors")


def merged(models, file, patterns=None, **given):
    """-> the models with the file merged, one after the other, and how many modules of each."""
    encoders, unet = models = copy.deepcopy(models)
    plan = planned_merges(
        lora, [(file, 0.5)], text_encoders=encoders, denoiser=unet, patterns=patterns or ModulePatterns(), **given
    )
    return models, [plan.into([model], CPU) for model in (*encoders, unet)]


def weights(models):
    encoders, unet = models
    return {f"{place}.{name}": value for place, model in enumerate((*encoders, unet)) for name, value in model.named_parameters()}


def test_each_model_gets_its_share(models, file):
    after, counts = merged(models, file)
    assert counts[:2] == [12, 12] and counts[2] > 100
    encoders, unet = copy.deepcopy(models)
    network, tensors = lora.create_network_from_weights(0.5, file, None, encoders, unet)
    network.apply_to(encoders, unet)
    network.merge_to(encoders, unet, tensors)
    before, wanted, found = weights(models), weights((encoders, unet)), weights(after)
    changed = [name for name in before if not torch.equal(before[name], found[name])]
    assert len(changed) == sum(counts)
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_files_beside_the_weights_act_as_merged_ones(models, file):
    after, _ = merged(models, file, ModulePatterns.of(["mlp"], None))
    (encoders, unet), rest = copy.deepcopy(models), copy.deepcopy(models)
    plan = planned_merges(
        lora, [(file, 2.0), (file, 0.25)], text_encoders=encoders, denoiser=unet, patterns=ModulePatterns.of(["mlp"], None)
    )
    before = weights((encoders, unet))
    count = plan.beside(encoders, CPU)
    assert count == 2 * sum(".mlp.fc" in path for encoder in encoders for path, _ in encoder.named_modules())
    layers = [encoder.get_submodule("text_model.encoder.layers.0.mlp.fc1") if hasattr(encoder, "text_model")
              else encoder.get_submodule("encoder.layers.0.mlp.fc1") for encoder in (encoders[0], after[0][0], rest[0][0])]  # fmt: skip
    x = torch.randn(2, layers[0].in_features)
    plan.set_strengths([0.25, 0.25])
    beside, wanted, plain = (layer(x) for layer in layers)
    torch.testing.assert_close(beside, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    plan.set_strengths([0, 0])
    assert torch.equal(layers[0](x), plain)
    assert all(torch.equal(value, before[name]) for name, value in weights((encoders, unet)).items())


def test_patterns_know_the_names_of_the_file_and_of_the_model(models, file):
    by_file = ModulePatterns.of(["input_blocks_4_1_proj_in"], None)
    by_path = ModulePatterns.of([r"down_blocks\.1\.attentions\.0\.proj_in"], None)
    assert merged(models, file, by_file)[1] == merged(models, file, by_path)[1] == [0, 0, 1]
    with pytest.raises(NetworkError, match="fits no module"):
        merged(models, file, ModulePatterns.of(["lora_te3"], None))


def test_lycoris_merges_the_same(models, file):
    pytest.importorskip("lycoris.kohya")
    ours, counts = merged(models, file)
    theirs, their_counts = merged(models, file, lycoris=True)
    assert their_counts == counts
    for name, value in weights(theirs).items():
        torch.testing.assert_close(value, weights(ours)[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_bare_tree_has_the_layers_and_nothing_else(models):
    _, unet = models
    paths = ["down_blocks.1.attentions.0.proj_in", "down_blocks.1.attentions.0.proj_out", "mid_block.resnets.0.conv1"]
    tree = bare_tree(unet, paths)
    assert [path for path, module in tree.named_modules() if type(module) is not torch.nn.Module] == paths
    assert tree.get_submodule(paths[2]) is unet.get_submodule(paths[2])
