"""What the plan says of the trained parts is what the network has, not what the options ask for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.errors import NetworkError
from library.options.command_line import read_options
from library.options.sd import SdxlTrainOptions
from library.training.models import networks
from library.training.models.trained_parts import check_denoiser_is_there, trained_line
from tests.networks.sd_models import text_encoders_of, unet_of

pytest.importorskip("diffusers")
PATHS = "--pretrained_model_name_or_path=x --dataset_config=x --output_dir=x --network_module=networks.lora --network_dim=2"


def options_of(*flags):
    return read_options(SdxlTrainOptions, [*PATHS.split(), "--learning_rate=1e-3", *flags])


def applied(options):
    encoders = networks.with_gaps("networks.lora", text_encoders_of("sdxl", tiny=True), options.text_rates)
    network = networks.create_network(options.network, unet := unet_of("sdxl", tiny=True), encoders)
    network.apply_to(encoders, unet, options.trains_text_encoder, options.trains_denoiser)
    return network


def told(*flags):
    options = options_of(*flags)
    network = applied(options)
    return trained_line(network, networks.optimizer_groups(network, options.optimizer, options.given_text_rates), options)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "denoiser: 302 modules at 0.001; text encoder 1: 12 modules at 0.001; text encoder 2: 12 modules at 0.001"),
        ("--unet_lr=1e-4 --text_encoder_lr1=5e-5 --text_encoder_lr2=0",
         "denoiser: 302 modules at 0.0001; text encoder 1: 12 modules at 5e-05; text encoder 2: none (its learning rate is 0)"),
        ("--network_train_text_encoder_only",
         "denoiser: none (--network_train_text_encoder_only); text encoder 1: 12 modules at 0.001; "
         "text encoder 2: 12 modules at 0.001"),
        ("--network_train_unet_only --network_args loraplus_lr_ratio=16",
         "denoiser: 302 modules at 0.001 (lora_up at 0.016); text encoders: none (--network_train_unet_only)"),
        ("--network_train_unet_only --network_args network_reg_lrs=.*attn1.*=1e-4,.*attn2.*=0",
         "denoiser: 302 modules (78 at 0.001, 112 at 0.0001, 112 not trained); text encoders: none (--network_train_unet_only)"),
        ("--network_train_unet_only --network_args up_lr_weight=zeros+0.5 down_lr_weight=linear+0.25",
         "at 6 rates from 0.0005 to 0.00125; text encoders: none"),
    ],
)  # fmt: skip
def test_what_is_trained_at_which_rate(flags, line):
    assert line in told(*flags.split())


def test_a_file_decides(tmp_path):
    file = tmp_path / "a.safetensors"
    applied(options_of("--text_encoder_lr1=0", "--text_encoder_lr2=1e-4")).save_weights(file, None, {})
    line = told("--dim_from_weights", f"--network_weights={file}")
    assert "text encoder 1: none (--network_weights has none of its modules); text encoder 2: 12 modules at 0.001" in line


def test_networks_of_others():
    network, weight = nn.Module(), nn.Parameter(torch.zeros(1))
    line = trained_line(network, ([{"params": [weight], "lr": 0.5}, {"params": [weight, weight]}], ["a", "b"]), options_of())
    assert line == "  trained: a: 1 tensors at 0.5; b: 2 tensors at 0.001"


def test_a_denoiser_that_is_to_be_trained_needs_modules():
    network = SimpleNamespace(unet_loras=[])
    with pytest.raises(
        NetworkError, match=r"no module of it: --network_module networks\.lora made none; give --network_module=netw"
    ):
        check_denoiser_is_there(network, options_of())
    check_denoiser_is_there(network, options_of("--network_train_text_encoder_only"))
    check_denoiser_is_there(SimpleNamespace(), options_of())
    with pytest.raises(NetworkError, match=r"no module of it: x\.safetensors has none; .*--network_train_text_encoder_only"):
        check_denoiser_is_there(network, options_of("--dim_from_weights", "--network_weights=x.safetensors"))
