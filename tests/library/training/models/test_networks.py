"""How the trainer makes and fills a network."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from library.errors import CheckpointError, NetworkError, UserError
from library.options.anima import ComponentRates
from library.options.network import NetworkOptions
from library.training.models import networks
from networks import lora_anima


def denoiser(width: int = 8) -> nn.Module:
    parts = {
        "self_attn": nn.ModuleDict({"q_proj": nn.Linear(width, width)}),
        "mlp": nn.ModuleDict({"layer1": nn.Linear(width, 2 * width)}),
    }
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict(parts)])
    return model.requires_grad_(False)


def options(**given) -> NetworkOptions:
    return NetworkOptions(network_module="networks.lora_anima", network_dim=2, **given)


def saved(path, *, dim: int = 2, width: int = 8):
    model = denoiser(width)
    network = lora_anima.create_network(1.0, dim, 1.0, None, None, model)
    network.apply_to(None, model)
    for lora in network.loras:
        torch.nn.init.ones_(lora.lora_up.weight)  # it has learned something
    network.save_weights(path, None, {})
    return path


def trained(network, model) -> dict[str, float]:
    network.apply_to([], model, False, True)
    groups, names = network.prepare_optimizer_params(None, None, 1.0)
    return {name: group["lr"] for name, group in zip(names, groups, strict=True)}


def test_rates_of_parts_reach_the_network(tmp_path):
    model = denoiser()
    network = networks.create_network(options(), model, [], rates=ComponentRates(mlp_lr=0.25))
    assert trained(network, model) == {"unet": 1.0, "unet mlp": 0.25}
    network = networks.create_network(options(), denoiser(), [], rates=ComponentRates(self_attn_lr=0))
    assert [lora.lora_name for lora in network.unet_loras] == ["lora_unet_blocks_0_mlp_layer1"]
    model = denoiser()
    file = saved(tmp_path / "a.safetensors")
    given = options(network_weights=str(file), dim_from_weights=True)
    assert trained(networks.create_network(given, model, [], rates=ComponentRates(mlp_lr=0)), model) == {"unet": 1.0}


def test_without_rates(tmp_path):
    for rates in (None, ComponentRates()):
        model = denoiser()
        assert trained(networks.create_network(options(), model, [], rates=rates), model) == {"unet": 1.0}


def test_modules_that_know_no_rates_are_named():
    third_party = NetworkOptions(network_module="tests.networks.third_party")
    with pytest.raises(NetworkError, match=r"^--self_attn_lr, --mlp_lr: the network module tests.networks.third_party knows no lear"
                                           r"ning rates.*work with networks.lora_anima"):  # fmt: skip
        networks.create_network(third_party, denoiser(), [], rates=ComponentRates(self_attn_lr=1e-4, mlp_lr=0))
    assert networks.create_network(third_party, denoiser(), [], rates=ComponentRates()) is not None


def test_rates_are_no_network_arguments():
    given = options(network_args=["mlp_lr=1e-4", "mod_lr=0"])
    with pytest.raises(NetworkError) as caught:
        networks.create_network(given, denoiser(), [], rates=ComponentRates())
    assert caught.value.problems == tuple(
        f"--network_args: {name} is a flag of its own: write --{name}=..." for name in ("mlp_lr", "mod_lr")
    )


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({"dim": 4}, r"has other ranks: .* \(rank 4 in the file, 2 here\).*--dim_from_weights"),
        (
            {"width": 16},
            r"is for a model of other sizes: lora_unet_blocks_0_self_attn_q_proj .* choose a file made for this model",
        ),
    ],
)
def test_network_weights_of_another_rank_or_size_are_one_error(tmp_path, file, said):
    network = networks.create_network(options(), model := denoiser(), [])
    network.apply_to([], model, False, True)
    with pytest.raises(NetworkError, match=said) as caught:
        networks.load_network_weights(network, saved(tmp_path / "a.safetensors", **file))
    assert len(caught.value.problems) == 1


def test_network_weights_of_another_architecture_are_one_error(tmp_path):
    network = networks.create_network(options(), model := denoiser(), [])
    network.apply_to([], model, False, True)
    for prefix, said in (
        ("lora_unet_double_blocks_0_img_attn_qkv", r"a\.pt is a LoRA for FLUX, not for Anima.*choose one made for Anima"),
        ("lora_transformer_layers_0_attn", r"a\.pt is no LoRA for this model.*choose a file made for this architecture"),
    ):
        torch.save(
            {f"{prefix}.lora_down.weight": torch.zeros(2, 8), f"{prefix}.lora_up.weight": torch.zeros(8, 2)}, tmp_path / "a.pt"
        )
        with pytest.raises(UserError, match=said) as caught:
            networks.load_network_weights(network, tmp_path / "a.pt")
        assert len(caught.value.problems) == 1
    with pytest.raises(CheckpointError, match=r"--network_weights .*b\.pt: there is no such file \(did you mean a\.pt\?\)"):
        networks.load_network_weights(network, tmp_path / "b.pt")


@pytest.mark.parametrize("flag", ["--network_weights", "--base_weights"])
def test_a_folder_is_no_lora_file(tmp_path, flag):
    with pytest.raises(CheckpointError, match=rf"{flag} .* is a folder: give the file in it$"):
        networks.check_weights_file(flag, tmp_path)
    saved(tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"is a folder: give the file in it \(it has mine\.safetensors\)$"):
        networks.check_weights_file(flag, tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("networks.lora_animo", r"networks\.lora_animo cannot be found \(did you mean networks\.lora_anima\?\)$"),
        (
            "networks.xyzxyzxyzxyz",
            r"the network modules of this project are networks\.lora, networks\.lora_anima, networks\.lora_lumina, networks\.lora_sd3$",
        ),
        ("networks", r"networks cannot be found"),
        (
            "networks.lora_formats",
            r"is not a network module: it has no create_network; use networks\.lora or networks\.lora_anima or networks\.lora_lumina or networks\.lora_sd3$",
        ),
        ("no_such_package.kohya", r"cannot be found; if it is a package of its own: pip install no_such_package$"),
        (".x", r"cannot be found"),
    ],
)
def test_modules_that_are_not_there(name, said):
    with pytest.raises(NetworkError, match=said):
        networks.find_network_module(name)


@pytest.mark.parametrize("name", ["networks.lora_anima", "tests.networks.third_party", "diffusers.anything"])
def test_modules_that_may_be_there(name):
    networks.find_network_module(name)


def test_modules_are_looked_for_before_torch_is_imported():
    code = """
import sys
from library.errors import NetworkError
from library.training.models.networks import find_network_module
find_network_module("networks.lora_anima"); find_network_module("diffusers.x")
try:
    find_network_module("networks.lora_flux")
except NetworkError:
    sys.exit(bool({"torch", "diffusers"} & set(sys.modules)))
sys.exit("found")"""
    assert subprocess.run([sys.executable, "-c", code], cwd=networks.SCRIPTS, check=False).returncode == 0


def test_what_of_a_file_has_no_place_is_warned_of(tmp_path, caplog):
    file = saved(tmp_path / "a.safetensors")
    network = networks.create_network(options(), model := denoiser(), [], rates=ComponentRates(mlp_lr=0))
    network.apply_to([], model, False, True)
    with caplog.at_level(logging.WARNING):
        line = networks.load_network_weights(network, file)
    assert line == f"network weights loaded from {file}: 1 LoRA modules loaded"
    (warned,) = caplog.messages
    assert warned.startswith(
        f"warning: {file}: 1 module has no place in this network and what the file learned there is left out"
    )
    assert "(lora_unet_blocks_0_mlp_layer1)" in warned


@pytest.mark.parametrize(
    "module,known", [("networks.lora_anima", True), ("lycoris.kohya", True), ("networks_of_mine", False), (None, False)]
)
def test_modules_of_which_it_is_known_that_zeros_stay_zeros(module, known):
    assert networks.keeps_zeros(module) is known
