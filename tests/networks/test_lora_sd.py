"""networks.lora: which modules, names, ranks and learning rates its arguments give, and the files it reads and writes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from library.errors import CheckpointError, NetworkError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.training.files.saving import check_save_format
from networks import lora
from tests.networks.sd_models import KINDS, randomize, text_encoders_of, unet_of

pytest.importorskip("diffusers")


class Models(dict):
    """(text encoders, U-Net) of each kind, made when they are asked for."""

    def __init__(self, *, tiny: bool):
        super().__init__()
        self.tiny = tiny

    def __missing__(self, kind):
        torch.manual_seed(0)
        self[kind] = text_encoders_of(kind, tiny=self.tiny), unet_of(kind, tiny=self.tiny)
        return self[kind]


@pytest.fixture(scope="module")
def published():
    return Models(tiny=False)


@pytest.fixture
def tiny():
    return Models(tiny=True)


def create(models, *, dim=1, alpha=1.0, **given):
    encoders, unet = models
    return lora.create_network(1.0, dim, alpha, None, encoders, unet, **given)


def applied(models, **given):
    network = create(models, dim=4, **given)
    network.apply_to(*models)
    randomize(network)
    return network


def names(loras):
    return {made.lora_name for made in loras}


def prefixes(network):
    return {made.lora_name.partition("_text_model")[0] for made in network.text_encoder_loras}


# --- models


def test_the_text_encoders_of_sdxl_are_numbered(published):
    (first, second), unet = published["sdxl"]
    assert prefixes(create(([first, second], unet))) == {"lora_te1", "lora_te2"}
    assert prefixes(create(([first, None], unet))) == prefixes(create((first, unet))) == {"lora_te1"}
    assert prefixes(create(([None, second], unet))) == prefixes(create((second, unet))) == {"lora_te2"}
    assert prefixes(create(([first, second], None))) == {"lora_te1", "lora_te2"}
    assert prefixes(create(([None, second], None))) == {"lora_te2"}
    assert [len(create(([first, None], unet)).text_encoder_loras), len(create((second, unet)).text_encoder_loras)] == [72, 192]


def test_that_of_sd_is_not(published):
    (encoder,), unet = published["sd1"]
    assert prefixes(create((encoder, unet))) == prefixes(create(([encoder], None))) == {"lora_te"}
    assert not create((None, unet)).text_encoder_loras


def test_names_do_not_follow_the_version_of_transformers(published):
    """The modules of its CLIPTextModel are text_model.encoder.layers... or, since 5.0, encoder.layers..."""
    (encoder,), unet = published["sd1"]
    assert names(create((encoder.text_model, unet)).text_encoder_loras) == names(create((encoder, unet)).text_encoder_loras)


def test_wrappers_change_no_name(published):
    _, unet = published["sdxl"]
    wrapped = nn.Module()
    wrapped.add_module("module", unet)
    assert names(create((None, wrapped)).loras) == names(create((None, unet)).loras)


def test_another_model_is_refused(make_tree):
    with pytest.raises(NetworkError, match=r"networks.lora is for the models of.*networks.lora_anima"):
        create((None, make_tree({"blocks.0.mlp.layer1": (3, 3)})))


def test_two_networks_do_not_disturb_each_other(published):
    """In the reference a network from weights, or one with conv_dim, gives all later ones further modules."""
    alone = names(create(published["sd1"]).loras)
    with_convolutions = create(published["sd1"], conv_dim="4")
    rows = [(made.lora_name, made.lora_down.weight, made.lora_up.weight) for made in with_convolutions.loras]
    weights = {f"{name}.{part}": tensor for name, down, up in rows
               for part, tensor in (("lora_down.weight", down.detach()), ("lora_up.weight", up.detach()))}  # fmt: skip
    lora.create_network_from_weights(1.0, "unread", None, *published["sd1"], weights_sd=weights)
    assert names(create(published["sd1"]).loras) == alone and len(alone) == 72 + 192


# --- arguments


def test_unknown_arguments(published):
    with pytest.raises(NetworkError, match=r"conv_dims is not an argument of this network \(did you mean conv_dim\?\)"):
        create(published["sd1"], conv_dims="4")


def test_convolutions_take_their_own_rank_and_alpha(published):
    network = create(published["sdxl"], dim=8, alpha=4.0, conv_dim="2", conv_alpha="0.5")
    by_name = {made.lora_name: (made.lora_dim, float(made.alpha)) for made in network.loras}
    block = "lora_unet_input_blocks_4_0"
    assert by_name[f"{block}_in_layers_2"] == by_name["lora_unet_input_blocks_3_0_op"] == (2, 0.5)
    assert by_name["lora_unet_output_blocks_2_2_conv"] == (2, 0.5)
    assert by_name[f"{block}_emb_layers_1"] == by_name[f"{block}_skip_connection"] == (8, 4.0)
    assert by_name["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == (8, 4.0)
    assert by_name["lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj"] == (8, 4.0)


def test_conv_block_dims_alone_act(published):
    """In the reference only together with block_dims or a factor of the learning rate."""
    dims = ["0"] * 25
    dims[12] = "3"
    network = create(published["sd1"], conv_block_dims=",".join(dims))
    wide = {
        made.lora_name for made in network.unet_loras if made.lora_down.weight.shape[-1] == 3 and made.lora_down.weight.ndim == 4
    }
    assert wide == {f"lora_unet_mid_block_resnets_{n}_conv{m}" for n in (0, 1) for m in (1, 2)}


def test_patterns_go_by_the_paths_of_the_file(published):
    network = create(
        published["sdxl"],
        exclude_patterns=r"text_model.*|.*transformer_blocks.*",
        include_patterns=r"input_blocks\.1\.0\.in_layers\.2",
    )
    assert len(network.loras) == 2 * 11 + 1
    assert "lora_unet_input_blocks_1_0_in_layers_2" in names(network.loras)
    with pytest.raises(NetworkError, match=r"'down_blocks.*' matches none of.*such as input_blocks.4.1.proj_in"):
        create(published["sdxl"], exclude_patterns=r"down_blocks.*")


def test_patterns_override_blocks(published):
    given = {"block_dims": ",".join(["0"] * 12 + ["6"] + ["0"] * 12), "mid_lr_weight": "0.5"}
    network = create(published["sd1"], network_reg_dims=r"down_blocks\.0\.attentions.*=2", network_reg_lrs=r".*mid_block.*proj_in=1e-3",
                     **given)  # fmt: skip
    ranks = {made.lora_name: made.lora_dim for made in network.unet_loras}
    assert len(ranks) == 12 + 24 and ranks["lora_unet_down_blocks_0_attentions_1_proj_in"] == 2
    assert ranks["lora_unet_mid_block_attentions_0_proj_in"] == 6
    network.apply_to(None, None, False, True)
    try:
        groups, texts = network.prepare_optimizer_params(None, 1e-4)
    finally:
        take_out(network)
    found = dict(zip(texts, (group["lr"] for group in groups), strict=True))
    assert found == {"unet reg_lr_0": 1e-3, "unet_block1": 1e-4, "unet_block2": 1e-4, "unet_block12": 5e-5}


def test_a_rate_by_pattern_brings_back_a_block_of_factor_zero(published):
    network = create(published["sd1"], mid_lr_weight="0", network_reg_lrs=r"mid_block.*to_q=1e-3")
    assert len([name for name in names(network.unet_loras) if "mid_block" in name]) == 2


def test_each_text_encoder_has_its_rate(published):
    network = create(published["sdxl"])
    network.apply_to(*published["sdxl"])
    try:
        groups, texts = network.prepare_optimizer_params([1e-5, 2e-5], 1e-4)
    finally:
        take_out(network)
    assert [(text, group["lr"]) for text, group in zip(texts, groups, strict=True)] == [
        ("textencoder 1", 1e-5), ("textencoder 2", 2e-5), ("unet", 1e-4)]  # fmt: skip


def test_the_only_text_encoder_takes_the_first_rate(published):
    network = create(published["sd1"])
    network.apply_to(*published["sd1"])
    try:
        groups, texts = network.prepare_optimizer_params([1e-5, 2e-5], 0.0)
    finally:
        take_out(network)
    assert [(text, group["lr"]) for text, group in zip(texts, groups, strict=True)] == [("textencoder", 1e-5)]


def take_out(network) -> None:
    """The models serve the next test."""
    for made in network.loras:
        made.org_module_ref[0].__dict__.pop("forward", None)


def test_odd_arguments_are_told(published, caplog):
    with caplog.at_level(logging.WARNING, logger="networks.network"):
        create(published["sd1"], conv_alpha="2", down_lr_weight="1,1")
    assert [record.getMessage() for record in caplog.records] == [
        "warning: --network_args: down_lr_weight has 2 values for 12 blocks: 1 is taken for the others",
        "warning: --network_args: conv_alpha does nothing without conv_dim or conv_block_dims: 3x3 convolutions have no LoRA",
    ]


# --- files


def saved(network, path, layout=None):
    if layout:
        network.save_weights_as(layout, path, None, {})
    else:
        network.save_weights(path, None, {})
    return dict(read_tensors(read_header(path)))


def test_a_file_decides_modules_and_ranks_but_not_rates_and_dropouts(tiny, tmp_path, caplog):
    network = applied(tiny["sd1"], conv_dim="3", conv_alpha="2", block_dims=",".join(map(str, range(25))))
    saved(network, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING, logger="networks.network"):
        again, _ = lora.create_network_from_weights(
            1.0, tmp_path / "a.safetensors", None, *tiny["sd1"], conv_dim="8", mid_lr_weight="0", rank_dropout="0.1"
        )
    assert {made.lora_name: (made.lora_dim, float(made.alpha)) for made in again.loras} == {
        made.lora_name: (made.lora_dim, float(made.alpha)) for made in network.loras
    }
    assert again.loras[0].dropouts.rank == 0.1 and "so conv_dim does nothing" in caplog.text
    again.apply_to(None, None)
    groups, texts = again.prepare_optimizer_params(1e-4, 1e-4)
    assert "unet_block12" not in texts and "unet_block11" in texts  # kept in the file, untrained
    assert sum(len(group["params"]) for group in groups) < 2 * len(again.loras)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
def test_every_layout_comes_back(tiny, kind, layout, tmp_path):
    network = applied(tiny[kind], conv_dim="3", alpha=2.0)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    tensors = saved(network, tmp_path / "a.safetensors", layout)
    assert network.layout_problems(layout) == []
    assert ("are the names that are written anyway" in (network.layout_note(layout) or "")) == (layout == "comfy")
    loaded, weights = lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, *tiny[kind])
    assert names(loaded.loras) == names(network.loras) and set(weights) == set(before)
    report = network.load_weights(tmp_path / "a.safetensors")
    assert report.loaded == len(network.loras) and not report.missing and not report.unexpected
    for made in network.loras:
        old = {part: before[f"{made.lora_name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")}
        strength = float(old["alpha"]) / made.lora_dim
        torch.testing.assert_close(product(made.lora_down.weight, made.lora_up.weight) * made.scale,
                                   product(old["lora_down.weight"], old["lora_up.weight"]) * strength)  # fmt: skip
    assert len(tensors) == len(network.loras) * (3 if layout == "comfy" else 2)


def test_that_comfy_changes_nothing_is_said(tiny, caplog):
    with caplog.at_level(logging.INFO, logger="library.training.files.saving"):
        check_save_format(applied(tiny["sdxl"]), "comfy")
    assert [record.getMessage() for record in caplog.records] == [
        "--save_format=comfy: ComfyUI's names for a LoRA of this model are the names that are written anyway"
    ]


def product(down, up):
    return up.flatten(1) @ down.flatten(1)


@pytest.mark.parametrize("linear", [False, True])
def test_projections_of_sd2_load_as_matrices_and_as_convolutions(linear, tmp_path):
    torch.manual_seed(0)
    source, target = (None, unet_of("sd2", tiny=True, linear=linear)), (None, unet_of("sd2", tiny=True, linear=not linear))
    network = applied(source)
    tensors = saved(network, tmp_path / "a.safetensors")
    name = "lora_unet_mid_block_attentions_0_proj_in"
    assert tensors[f"{name}.lora_down.weight"].ndim == (2 if linear else 4)
    other, weights = lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, *target)
    assert weights[f"{name}.lora_down.weight"].ndim == (4 if linear else 2)
    other.apply_to(*target)
    other.load_state_dict(weights)
    started = applied((None, target[1]))
    assert started.load_weights(tmp_path / "a.safetensors").loaded == len(network.loras)
    mine = {made.lora_name: made for made in network.loras}
    for made in (*other.loras, *started.loras):
        same = mine[made.lora_name]
        assert torch.equal(
            product(made.lora_down.weight, made.lora_up.weight), product(same.lora_down.weight, same.lora_up.weight)
        )


def test_diffusers_gets_sd2s_projections_as_matrices(tiny, tmp_path):
    for kind, sides in (("sd1", 4), ("sd2", 2), ("sdxl", 2)):
        tensors = saved(applied(tiny[kind]), tmp_path / f"{kind}.safetensors", "diffusers")
        assert tensors["unet.mid_block.attentions.0.proj_out.lora_A.weight"].ndim == sides


def test_names_of_diffusers_style_in_a_file_for_sdxl(tiny, tmp_path):
    """As trainers that follow diffusers' paths write them, in the form of this project's names."""
    network = applied(tiny["sdxl"], conv_dim="2")
    paths = {theirs: ours for ours, theirs in lora.original_paths(tiny["sdxl"][1]).items()}
    renamed = {}
    for made in network.loras:
        path = network._targets[made.lora_name].candidate.path
        theirs = f"lora_unet_{paths[path].replace('.', '_')}" if path in paths else made.lora_name
        renamed |= {f"{theirs}.{part}": tensor.detach().clone() for part, tensor in made.state_dict().items()}
    assert "lora_unet_down_blocks_1_attentions_0_proj_in.alpha" in renamed
    save_safetensors(tmp_path / "a.safetensors", renamed)
    again, weights = lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, *tiny["sdxl"])
    assert names(again.loras) == names(network.loras)
    assert set(weights) == set(network.state_dict())


def test_merging_equals_the_forward_pass(tiny):
    """Convolutions, too."""
    network = applied(tiny["sd2"], conv_dim="3", alpha=2.0)
    _, unet = tiny["sd2"]
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 16)
    with torch.no_grad():
        wanted = unet.predict(*inputs)
        network.merge_to(None, None, network.state_dict())
        network.set_enabled(False)
        torch.testing.assert_close(unet.predict(*inputs), wanted, rtol=1e-4, atol=1e-4)


def test_a_lora_of_another_model_is_named(tiny, tmp_path):
    for kind in ("sd1", "sdxl"):
        saved(applied(tiny[kind]), tmp_path / f"{kind}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"sd1.safetensors is a LoRA for Stable Diffusion 1.x or 2.x, not for SDXL, which has no"
    ):
        lora.create_network_from_weights(1.0, tmp_path / "sd1.safetensors", None, *tiny["sdxl"])
    with pytest.raises(CheckpointError, match=r"sdxl.safetensors is a LoRA for SDXL, not for Stable Diffusion 1.x or 2.x, which"):
        lora.create_network_from_weights(1.0, tmp_path / "sdxl.safetensors", None, *tiny["sd1"])


def test_a_lora_of_a_model_that_shares_a_text_encoder_is_refused(tiny, tmp_path):
    """Its U-Net's part would be left out, and its text encoder's alone would act."""
    network = applied(tiny["sdxl"])
    shared = {key: value for key, value in network.state_dict().items() if key.startswith("lora_te1_")}
    other = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{part}.weight": torch.zeros(4, 4) for part in ("down", "up")}
    save_safetensors(tmp_path / "flux.safetensors", {**shared, **other})
    with pytest.raises(
        CheckpointError, match=r"flux.safetensors is a LoRA for FLUX, not for SDXL, which has no lora_unet_double"
    ):
        lora.create_network_from_weights(1.0, tmp_path / "flux.safetensors", None, *tiny["sdxl"])
    with pytest.raises(CheckpointError, match=r"flux.safetensors is a LoRA for FLUX"):
        network.load_weights(tmp_path / "flux.safetensors")


def test_a_lora_of_what_is_not_trained_here_is_named(tiny, tmp_path):
    encoders, unet = tiny["sd1"]
    saved(applied((encoders, None)), tmp_path / "a.safetensors")
    with pytest.raises(
        NetworkError, match=r"a LoRA for Stable Diffusion 1.x or 2.x, but for other parts of it than the network has"
    ):
        lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, unet)
