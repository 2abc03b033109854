from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.errors import OptionError
from library.nn.fp8 import FP8, fp8_layers, quantised
from library.options.anima import AnimaTrainOptions
from library.options.memory import BlockMemoryOptions
from library.options.network import NetworkOptions
from library.options.run import RunOptions
from library.training.models.fp8_models import arrange_fp8, prepare_fp8, wait_for_merging
from library.training.models.networks import merge_base_weights
from networks.lora_anima import create_network
from tests.library.anima.tiny_dit import TINY, tiny_denoiser, tiny_weights

CPU = torch.device("cpu")
LAYERS = r"blocks\.\d+\.mlp\.layer[12]"


def options_with(memory: dict[str, object], module: str = "networks.lora_anima", **network: object) -> AnimaTrainOptions:
    return AnimaTrainOptions(
        memory=BlockMemoryOptions(**memory),  # type: ignore[arg-type]
        network=NetworkOptions(network_module=module, **network),  # type: ignore[arg-type]
    )


def on_meta():
    from library.anima.checkpoint import build_denoiser

    return build_denoiser(TINY)


def load(denoiser) -> None:
    from library.nn.loading import load_into

    load_into(denoiser, tiny_weights().items(), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("flag", "layers"), [("fp8_base", 4), ("fp8_base_unet", 4), ("gradient_checkpointing", 0)])
def test_both_flags_concern_the_denoiser(flag, layers):
    denoiser = on_meta()
    prepare_fp8(options_with({flag: True}), denoiser, LAYERS, device=CPU)
    assert len(list(fp8_layers(denoiser))) == layers


def test_modules_that_may_read_the_weights_themselves_are_refused():
    with pytest.raises(OptionError, match=r"--fp8_base.*lycoris\.kohya may take the 8 bit weights"):
        prepare_fp8(options_with({"fp8_base": True}, "lycoris.kohya"), on_meta(), LAYERS, device=CPU)
    prepare_fp8(options_with({}, "lycoris.kohya"), on_meta(), LAYERS, device=CPU)


def test_a_device_without_numbers_of_8_bits_is_told(monkeypatch):
    """As Apple's GPUs say it."""

    def refuse(tensor, *args, **kwargs):
        raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support for that dtype.")

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    with pytest.raises(OptionError, match=r"--fp8_base_unet: this cpu device .*Float8_e4m3fn to the MPS .*drop the flag"):
        prepare_fp8(options_with({"fp8_base_unet": True}), on_meta(), LAYERS, device=CPU)


@pytest.fixture
def base_weights(tmp_path):
    """Two LoRA files with something in them, of ranks of their own."""
    files = []
    for number, rank in enumerate((2, 3)):
        torch.manual_seed(number)
        denoiser = tiny_denoiser()
        network = create_network(1.0, rank, float(rank), None, None, denoiser)
        network.apply_to(None, denoiser, False, True)
        for lora in network.unet_loras:
            torch.nn.init.normal_(lora.lora_up.weight, std=0.05)
        files.append(tmp_path / f"base{number}.safetensors")
        network.save_weights(files[-1], None, None)
    return tuple(files)


def test_base_weights_are_merged_before_the_one_rounding(base_weights):
    options = options_with({"fp8_base_unet": True}, base_weights=base_weights, base_weights_multiplier=(0.5,))
    denoiser, plain = on_meta(), on_meta()
    prepare_fp8(options, denoiser, LAYERS, device=CPU)
    wait_for_merging(options, denoiser)
    for model in (denoiser, plain):
        load(model)
        merge_base_weights(options.network, model, [], torch.float32)
    for layer in fp8_layers(denoiser):
        weight8, scale = quantised(plain.get_submodule(layer.path).weight)
        assert torch.equal(layer.weight.view(torch.uint8), weight8.view(torch.uint8)) and torch.equal(layer.weight_scale, scale)
    name = "blocks.0.self_attn.q_proj.weight"  # not in 8 bits here: merged as ever
    assert torch.equal(denoiser.get_parameter(name), plain.get_parameter(name))
    assert not torch.equal(plain.get_parameter(name), tiny_weights()[name])


def test_without_base_weights_nothing_waits():
    options = options_with({"fp8_base_unet": True})
    denoiser = on_meta()
    prepare_fp8(options, denoiser, LAYERS, device=CPU)
    wait_for_merging(options, denoiser)
    load(denoiser)
    assert all(layer.weight.dtype == FP8 for layer in fp8_layers(denoiser))


def test_the_choice_of_products_is_told():
    options = options_with({"fp8_base": True})
    denoiser = on_meta()
    assert list(arrange_fp8(options, denoiser, torch.device("cpu"), dtype=torch.bfloat16)) == []
    prepare_fp8(options, denoiser, LAYERS, device=CPU)
    lines = list(arrange_fp8(options, denoiser, torch.device("cpu"), dtype=torch.bfloat16))
    assert lines == [
        "AnimaDenoiser: 4 layers in 8 bits, dequantised for their products (products in 8 bits need an NVIDIA GPU)",
        "text encoder: in 8 bits as well, dequantised for its products (--fp8_base_unet leaves it as it is)",
    ]
    options = replace(options_with({"fp8_base_unet": True}), run=RunOptions(deterministic=True))
    (line,) = arrange_fp8(options, denoiser, torch.device("cuda"), dtype=torch.bfloat16)
    assert line.endswith("dequantised for their products (--deterministic)")
