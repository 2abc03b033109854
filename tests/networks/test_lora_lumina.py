"""Names, ranks, arguments and refusals of networks.lora_lumina."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError, NetworkError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.lumina.checkpoint import build_denoiser
from library.lumina.layout import NextDitConfig
from library.lumina.text import LuminaTextEncoder
from networks import lora_lumina
from networks.arguments import parse_arguments
from networks.lumina_arguments import LuminaArguments
from tests.networks.lumina_models import denoiser, gemma, randomize

SPECS = os.environ.get("SPECS_DIR")
BLOCKS = {"layers": 2, "noise_refiner": 2, "context_refiner": 2}


@pytest.fixture
def tiny():
    return denoiser()


@pytest.fixture(scope="module")
def published():
    return denoiser(published=True)


def create(unet, text_encoders=None, *, dim=4, alpha=1.0, **given):
    return lora_lumina.create_network(1.0, dim, alpha, None, text_encoders, unet, **given)


def ranks(network) -> dict[str, int]:
    """{path with underscores: rank} of the denoiser."""
    return {lora.lora_name.removeprefix("lora_unet_"): lora.lora_dim for lora in network.unet_loras}


def parts(network) -> set[str]:
    return {name.partition("_0_")[0].partition("_1_")[0] for name in ranks(network)}


# --- names


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
def test_published_names_and_shapes(published):
    modules = json.loads(gzip.decompress((Path(SPECS or "") / "lora" / "lumina2.json.gz").read_bytes()))["modules"]
    network = create(published, gemma(published=True))
    assert described(network.unet_loras) == recorded(modules["nextdit"]) and len(network.unet_loras) == 180
    assert described(network.text_encoder_loras) == recorded(modules["gemma2"]) and len(network.text_encoder_loras) == 182
    everything = create(published, embedder_dims="[4,4,4]")
    assert described(everything.unet_loras) == recorded({**modules["nextdit"], **modules["nextdit_extra_with_embedder_dims"]})
    paths = {made.lora_name: everything._targets[made.lora_name].candidate.path for made in everything.loras}
    assert all(modules["nextdit"][name]["module"] == path for name, path in paths.items() if name in modules["nextdit"])


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
def test_names_and_shapes_in_the_real_models(published):
    """The encoder ends before the last layer of the checkpoint, whose states nothing reads: no LoRA there ever learns."""
    pytest.importorskip("transformers")
    from library.lumina.gemma import build_gemma
    from library.lumina.gemma_layout import GemmaConfig

    real = build_denoiser(NextDitConfig())
    everything = {"embedder_dims": "[4,4,4]"}
    assert described(create(real, **everything).unet_loras) == described(create(published, **everything).unet_loras)
    assert parts(create(real, train_block_indices="0-25", dim=1)) == parts(create(published, dim=1))
    with pytest.raises(NetworkError, match="26 goes past the last block, 25"):
        create(real, train_block_indices="26")
    encoder = LuminaTextEncoder(build_gemma(GemmaConfig()), tokenizer=None, width=2304)
    found = described(create(None, [encoder]).text_encoder_loras)
    whole = described(create(None, gemma(published=True)).text_encoder_loras)
    assert found == {name: shape for name, shape in whole.items() if "_layers_25_" not in name} and len(found) == 175


def described(loras):
    return {made.lora_name: (list(made.lora_down.weight.shape), list(made.lora_up.weight.shape)) for made in loras}


def recorded(modules):
    return {name: (facts["down"], facts["up"]) for name, facts in modules.items()}


def test_modules_of_the_tiny_model(tiny):
    network = create(tiny, [gemma()])
    assert len(network.unet_loras) == 2 * 5 + 4 * 6 + 2
    assert len(network.text_encoder_loras) == 2 * 7
    assert {made.lora_name.partition("_layers")[0] for made in network.text_encoder_loras} == {"lora_te"}


def test_text_encoder_alone_or_in_a_list_or_none(tiny):
    for given, count in ((gemma(), 14), ([gemma()], 14), ([], 0), (None, 0), ([None], 0)):
        assert len(create(tiny, given).text_encoder_loras) == count
    assert len(create(None, gemma()).unet_loras) == 0


# --- which blocks


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("all", {"layers", "noise_refiner", "context_refiner", "final_layer_linear", "final_layer_adaLN_modulation_1"}),
        ("transformer", {"layers"}),
        ("refiners", {"noise_refiner", "context_refiner"}),
        ("noise_refiner", {"noise_refiner"}),
        ("context_refiner", {"context_refiner"}),
    ],
)
def test_train_blocks(tiny, word, wanted):
    assert parts(create(tiny, train_blocks=word)) == wanted


def test_embedders_are_chosen_apart_from_blocks(tiny):
    network = create(tiny, train_blocks="context_refiner", embedder_dims="[3,0,5]")
    found = ranks(network)
    assert {name: rank for name, rank in found.items() if "embedder" in name} == {"x_embedder": 3, "cap_embedder_1": 5}
    assert parts(network) == {"context_refiner", "x_embedder", "cap_embedder_1"}


def test_train_block_indices(published):
    network = create(published, dim=1, train_block_indices="0-2, 8,25")
    chosen = {int(name.split("_")[1]) for name in ranks(network) if name.startswith("layers")}
    assert chosen == {0, 1, 2, 8, 25}
    assert {"noise_refiner", "context_refiner"} <= parts(network)
    assert "layers" not in parts(create(published, dim=1, train_block_indices="none"))
    assert len(create(published, dim=1, train_block_indices="all").unet_loras) == 180


def test_patterns_bend_the_blocks(tiny):
    network = create(tiny, train_blocks="refiners", include_patterns=r"layers\.1\.attention\..*", exclude_patterns=r".*w[13]",
                     network_reg_dims=r".*\.qkv=2")  # fmt: skip
    found = ranks(network)
    assert {name: rank for name, rank in found.items() if name.startswith("layers")} == {
        "layers_1_attention_qkv": 2, "layers_1_attention_out": 4,
    }  # fmt: skip
    assert "noise_refiner_0_feed_forward_w2" in found and "noise_refiner_0_feed_forward_w1" not in found


# --- ranks of parts


def test_ranks_of_parts(tiny):
    network = create(tiny, gemma(), attn_dim="8", mlp_dim="2", mod_dim="3", refiner_dim="5")
    for name, rank in ranks(network).items():
        wanted = 8 if "attention" in name else 2 if "feed_forward" in name else 3 if "adaLN" in name else 4
        assert rank == wanted, name
    assert {made.lora_dim for made in network.text_encoder_loras} == {4}


def test_the_refiners_rank_is_for_what_the_others_leave(tiny):
    found = ranks(create(tiny, attn_dim="8", refiner_dim="2"))
    assert {rank for name, rank in found.items() if "refiner" in name and "attention" not in name} == {2}
    assert {rank for name, rank in found.items() if "attention" in name} == {8}
    assert {rank for name, rank in found.items() if "refiner" not in name and "attention" not in name} == {4}


def test_rank_zero_leaves_a_part_out(tiny):
    found = ranks(create(tiny, mlp_dim="0", mod_dim=0))
    assert all("attention" in name or name == "final_layer_linear" for name in found) and len(found) == 13
    won = ranks(create(tiny, mlp_dim="0", network_reg_dims=r"layers\.0\.feed_forward\.w1=7"))
    assert {name: rank for name, rank in won.items() if "feed_forward" in name} == {"layers_0_feed_forward_w1": 7}


# --- q, k and v apart


def changes(network) -> dict[str, torch.Tensor]:
    """What each LoRA adds to its layer's weight."""
    found = {}
    for made in network.unet_loras:
        layer, identity = made.org_module_ref[0], torch.eye(made.org_module_ref[0].in_features)
        with torch.no_grad():
            found[made.lora_name] = (layer(identity) - torch.nn.functional.linear(identity, layer.weight, layer.bias)).T
    return found


def test_rows_of_the_published_model(published):
    network = create(published, split_qkv="true", attn_dim="2")
    split = [made for made in network.unet_loras if made.parts]
    assert {made.parts for made in split} == {(2304, 768, 768)} and len(split) == 30
    assert all(made.lora_name.endswith("_attention_qkv") for made in split)
    assert split[0].lora_down.weight.shape == (6, 2304) and split[0].lora_up.weight.shape == (3840, 2)
    assert not any(made.parts for made in create(published).unet_loras)


@pytest.mark.parametrize("again", [{}, {"split_qkv": "true"}])
def test_a_split_file_acts_as_what_was_trained(tiny, tmp_path, again):
    file = tmp_path / "a.safetensors"
    network = create(tiny, alpha=3.0, split_qkv="true")
    tensors = saved(network, tiny, file)
    wanted = changes(network)
    down, up = (tensors[f"lora_unet_layers_1_attention_qkv.lora_{half}.weight"] for half in ("down", "up"))
    assert down.shape == (12, 16) and up.shape == (32, 12) and float(tensors["lora_unet_layers_1_attention_qkv.alpha"]) == 9.0
    assert not up[:16, 4:].any() and not up[16:24, :4].any() and not up[16:24, 8:].any() and not up[24:, :8].any()
    for part in (slice(0, 16), slice(16, 24), slice(24, 32)):
        assert wanted["lora_unet_layers_1_attention_qkv"][part].abs().max() > 0.01
    other = denoiser()
    loaded, weights = lora_lumina.create_network_from_weights(1.0, file, None, None, other, **again)
    loaded.merge_to(None, other, weights)
    for name, layer in ((made.lora_name, made.org_module_ref[0]) for made in loaded.unet_loras):
        fresh = denoiser().get_submodule(loaded._targets[name].candidate.path)
        torch.testing.assert_close(layer.weight - fresh.weight, wanted[name], rtol=1e-4, atol=1e-5)


def test_training_goes_on_with_the_three_pairs(tiny, tmp_path):
    network = create(tiny, alpha=3.0, split_qkv="true")
    saved(network, tiny, tmp_path / "a.safetensors")
    other = denoiser()
    second = create(other, alpha=3.0, split_qkv="true")
    second.apply_to(None, other)
    assert second.load_weights(tmp_path / "a.safetensors").missing == ()
    for name, change in changes(second).items():
        torch.testing.assert_close(change, changes(network)[name], rtol=1e-5, atol=1e-6)


# --- what is refused, and what is told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"embedder_dims": "[4,4]"}, r"embedder_dims=\[4,4\] cannot be used: it has 2 values: give 3 ranks, for x_embedder"),
        ({"embedder_dims": "4"}, r"it has 1 value: give 3 ranks"),
        ({"embedder_dims": "4,4,4,4"}, r"it has 4 values: give 3 ranks"),
        ({"embedder_dims": "4,x,4"}, r"give whole numbers from 0 on"),
        ({"embedder_dims": "4,-1,4"}, r"give whole numbers from 0 on"),
        ({"train_blocks": "transformers"}, r"give one of all, transformer, .*did you mean transformer\?"),
        ({"train_blocks": "0-5"}, r"train_block_indices takes numbers of layers"),
        ({"train_block_indices": "0-2"}, r"train_block_indices: 0-2 goes past the last block, 1: give numbers from 0 to 1"),
        ({"train_block_indices": "3-1"}, r"the range 3-1 ends before it begins: write 1-3"),
        ({"train_block_indices": "a"}, r"'a' is no block: give all, none, or numbers and ranges"),
        ({"attn_dim": "-1"}, r"attn_dim=-1 cannot be used: give a rank"),
        ({"split_qkv": "perhaps"}, r"split_qkv=perhaps cannot be used: give true or false"),
        ({"attn_dims": "4"}, r"attn_dims is not an argument of this network \(did you mean attn_dim\?\)"),
        ({"mlp_dim": 0, "train_blocks": "noise_refiner", "attn_dim": 0, "mod_dim": 0}, r"no module is left to train"),
    ],
)
def test_refusals(tiny, given, said):
    with pytest.raises(NetworkError, match=said):
        create(tiny, **given)


def test_arguments_that_do_nothing_are_told(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        create(tiny, conv_dim="4", conv_alpha="1")
    assert caplog.messages == [
        "warning: --network_args: conv_dim and conv_alpha do nothing: Lumina Image 2.0 has no convolutions; drop them"
    ]


@pytest.mark.parametrize(("given", "told"), [
    ({"refiner_dim": 4, "train_blocks": "transformer"}, ["refiner_dim does nothing: train_blocks=transformer leaves out the ref"]),
    ({"refiner_dim": 4, "train_blocks": "transformer", "include_patterns": ".*refiner.*"}, []),
    ({"refiner_dim": 4, "attn_dim": 2, "mlp_dim": 2, "mod_dim": 2}, ["refiner_dim does nothing: attn_dim, mlp_dim and mod_dim"]),
    ({"train_block_indices": "0", "train_blocks": "refiners"}, ["train_block_indices does nothing: train_blocks=refiners leaves"]),
    ({"refiner_dim": 4, "attn_dim": 2, "train_blocks": "noise_refiner"}, []),
])  # fmt: skip
def test_ranks_that_no_module_has_are_told(given, told):
    found = list(parse_arguments(LuminaArguments, given).warnings())
    assert len(found) == len(told) and all(line.startswith(words) for line, words in zip(found, told, strict=True))


def test_dropouts_and_learning_rates(tiny):
    network = create(tiny, gemma(), rank_dropout="0.2", module_dropout="0.3", dropout=0.1, loraplus_lr_ratio="4",
                     network_reg_lrs=r".*adaLN.*=1e-5")  # fmt: skip
    drop = network.unet_loras[0].dropouts
    assert (drop.neuron, drop.rank, drop.module) == (0.1, 0.2, 0.3)
    network.apply_to(None, tiny)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([2e-5, 3e-5], 1e-4, 1.0)
    assert [(name, group["lr"]) for name, group in zip(names, groups, strict=True)] == [
        ("textencoder", 2e-5), ("textencoder plus", 8e-5), ("unet reg_lr_0", 1e-5), ("unet reg_lr_0 plus", 4e-5),
        ("unet", 1e-4), ("unet plus", 4e-4),
    ]  # fmt: skip


# --- files


def saved(network, unet, file: Path) -> dict[str, torch.Tensor]:
    network.apply_to(None, unet)
    randomize(network)
    network.save_weights(file, None, {})
    return dict(read_tensors(read_header(file)))


def test_a_file_decides_the_modules(tiny, tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = saved(create(tiny, embedder_dims="2,3,4", mlp_dim=2, train_block_indices="1"), tiny, file)
    again, weights = lora_lumina.create_network_from_weights(1.0, file, None, None, denoiser())
    assert weights.keys() == tensors.keys()
    assert {made.lora_name: made.lora_dim for made in again.loras} == {
        key.removesuffix(".lora_down.weight"): tensor.shape[0] for key, tensor in tensors.items() if "lora_down" in key
    }
    assert ranks(again)["t_embedder_mlp_2"] == 3


@pytest.mark.parametrize("pad", [True, False])
def test_a_file_with_the_last_layer_of_gemma(tiny, tmp_path, caplog, pad):
    """Which other trainers write, and which an encoder that ends before it has not: nothing is trained there."""
    network = create(tiny, gemma(layers=3))
    tensors = saved(network, tiny, tmp_path / "a.safetensors")
    if pad:
        for key in tensors:
            if "layers_2_" in key and "lora_up" in key:
                tensors[key] = torch.zeros_like(tensors[key])
    save_safetensors(tmp_path / "b.safetensors", tensors)
    shorter = denoiser(), gemma(layers=2)
    with caplog.at_level(logging.WARNING):
        again, _ = lora_lumina.create_network_from_weights(1.0, tmp_path / "b.safetensors", None, [shorter[1]], shorter[0])
    assert len(again.text_encoder_loras) == 14 and len(again.unet_loras) == len(network.unet_loras)
    assert len(caplog.messages) == (0 if pad else 1), caplog.messages


@pytest.mark.parametrize("name", ["blocks_0_self_attn_q_proj", "joint_blocks_0_x_block_attn_qkv", "input_blocks_4_1_proj_in"])
def test_files_of_other_models_are_told(tiny, tmp_path, name):
    tensors = {f"lora_unet_{name}.lora_down.weight": torch.ones(4, 16), f"lora_unet_{name}.lora_up.weight": torch.ones(16, 4)}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"is a LoRA for (Anima|SD3|SDXL).*, not for Lumina Image 2\.0"):
        lora_lumina.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, tiny)
