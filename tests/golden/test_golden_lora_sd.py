"""LoRA for Stable Diffusion and SDXL against recorded numbers: layers, names, blocks and optimizer groups."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from golden_files import Golden, load_golden, load_golden_json, relative_error
from networks import lora
from networks.arguments import parse_arguments
from networks.layer import Dropouts, LoRAModule
from networks.network import LoRANetwork
from tests.networks.sd_models import text_encoders_of, unet_of

pytest.importorskip("diffusers")

TOLERANCE = 1e-5  # of the files' headers
BLOCKS = "data/lora_blocks_and_groups.json"
CASES = ("linear3d", "linear2d", "conv1x1", "conv3x3", "conv3x3_stride2")


@pytest.fixture
def golden() -> Golden:
    return load_golden("sd/lora_modules.safetensors")


# ---------------------------------------------------------------- layers


def applied(golden: Golden, name: str, *, dropouts: Dropouts | None = None) -> tuple[nn.Module, LoRAModule]:
    about = next(case for case in golden.about["cases"] if case["name"] == name)
    weights = {key.removeprefix(f"{name}/"): value.float() for key, value in golden.weights.items() if key.startswith(f"{name}/")}
    shape, bias = weights["layer.weight"].shape, "layer.bias" in weights
    layer: nn.Linear | nn.Conv2d
    if len(shape) == 2:
        layer = nn.Linear(shape[1], shape[0], bias=bias)
    else:
        layer = nn.Conv2d(shape[1], shape[0], tuple(about["kernel"]), tuple(about["stride"]), tuple(about["padding"]), bias=bias)
    layer.load_state_dict({key.removeprefix("layer."): value for key, value in weights.items() if key.startswith("layer.")})
    made = LoRAModule("lora_unet_x", layer.requires_grad_(False), lora_dim=about["rank"], alpha=about["alpha"] or 0,
                      multiplier=about["multiplier"], dropouts=dropouts or Dropouts())  # fmt: skip
    made.load_state_dict({**{key: value for key, value in weights.items() if key.startswith("lora_")}, "alpha": made.alpha})
    made.apply_to()
    return layer, made


@pytest.mark.parametrize("name", CASES)
def test_forward_gradients_and_merge(golden, name):
    layer, made = applied(golden, name)
    assert float(made.alpha) == float(golden.outputs[f"{name}/state_alpha"])
    check_run(golden, name, layer, made, "y", "")
    made.add_to_weight(made.state_dict())
    assert relative_error(layer.weight, golden.outputs[f"{name}/merged_weight"]) <= TOLERANCE
    made.enabled = False
    assert relative_error(layer(golden.inputs[f"{name}/x"].float()).detach(), golden.outputs[f"{name}/y_merged"]) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_rank_dropout_with_the_recorded_draw(golden, name, monkeypatch):
    layer, made = applied(golden, name, dropouts=Dropouts(rank=0.25))
    draw = golden.inputs[f"{name}/rank_dropout_draw"]
    monkeypatch.setattr(torch, "rand", lambda shape, **_: draw.clone().view(shape))
    check_run(golden, name, layer, made, "y_train_rank_dropout", "_rank_dropout")


def check_run(golden: Golden, name: str, layer: nn.Module, made: LoRAModule, output: str, suffix: str) -> None:
    out = layer(golden.inputs[f"{name}/x"].float())
    assert relative_error(out.detach(), golden.outputs[f"{name}/{output}"]) <= TOLERANCE
    out.pow(2).mean().backward()
    for part in ("lora_down", "lora_up"):
        recorded = golden.outputs[f"{name}/grad_{part}{suffix}"]
        assert relative_error(getattr(made, part).weight.grad, recorded) <= TOLERANCE, part


@pytest.mark.parametrize("limit", ["1.0", "0.3"])
def test_max_norm(golden, limit):
    part = f"max_norm_{limit}/"
    weights = {key.removeprefix(part): value.float() for key, value in golden.inputs.items() if key.startswith(part)}
    loras = [module_of(name, weights) for name in sorted({key.partition(".")[0] for key in weights})]
    network = LoRANetwork([], multiplier=1.0, dropouts=Dropouts(), arguments=lora.Sd1Arguments())
    network.unet_loras = loras
    recorded = golden.about[f"max_norm_{limit}"]
    scaled, mean, largest = network.apply_max_norm_regularization(float(limit), "cpu")
    assert int(scaled) == recorded["keys_scaled"]
    assert float(mean) == pytest.approx(recorded["mean_norm"], rel=TOLERANCE)
    assert float(largest) == pytest.approx(recorded["max_norm"], rel=TOLERANCE)
    for made in loras:
        for key, value in made.state_dict().items():
            assert relative_error(value, golden.outputs[f"{part}{made.lora_name}.{key}"]) <= TOLERANCE, key


def module_of(name: str, weights: dict[str, torch.Tensor]) -> LoRAModule:
    down, up = weights[f"{name}.lora_down.weight"], weights[f"{name}.lora_up.weight"]
    layer: nn.Linear | nn.Conv2d = (
        nn.Linear(down.shape[1], up.shape[0]) if down.ndim == 2 else nn.Conv2d(down.shape[1], up.shape[0], tuple(down.shape[2:]))  # type: ignore[arg-type]
    )
    made = LoRAModule(name, layer, lora_dim=down.shape[0])
    made.load_pair({"alpha": weights[f"{name}.alpha"], "lora_down.weight": down, "lora_up.weight": up})
    return made


# ---------------------------------------------------------------- names


@cache
def models_of(arch: str, linear: bool | None = None) -> tuple[list[nn.Module], nn.Module]:
    return text_encoders_of(arch), unet_of(arch, linear=linear)


def network_of(arch: str, options: dict, *, linear: bool | None = None) -> LoRANetwork:
    encoders, unet = models_of(arch, linear)
    options = {**options}
    rank, alpha = options.pop("network_dim", 4), options.pop("network_alpha", 1.0)
    return lora.create_network(1.0, rank, alpha, None, encoders, unet, **options)


@pytest.mark.parametrize(
    ("file", "variant"), [("sd/lora_names_sd1", "default"), ("sd/lora_names_sd1", "conv"), ("sd/lora_names_sd2", "default"),
                          ("sdxl/lora_names_sdxl", "default")]
)  # fmt: skip
def test_names_and_shapes(file, variant):
    recorded = load_golden_json(f"{file}.json")
    given = recorded["variants"][variant]
    # recorded with the Linears of the published SD 2; what single files are trained with are 1x1 convolutions
    network = network_of(recorded["arch"], given["options"], linear=True if recorded["arch"] == "sd2" else None)
    assert len(network.text_encoder_loras) == given["count_text_encoder"]
    assert len(network.unet_loras) == given["count_unet"]
    assert {made.lora_name: described(made) for made in network.loras} == {name: rest for name, *rest in given["modules"]}


def described(made: LoRAModule) -> list:
    return [list(made.lora_down.weight.shape), list(made.lora_up.weight.shape), float(made.alpha)]


def test_every_recorded_variant_is_tested():
    assert {arch: set(load_golden_json(f"{arch}.json")["variants"]) for arch in ("sd/lora_names_sd1", "sd/lora_names_sd2", "sdxl/lora_names_sdxl")} == {
        "sd/lora_names_sd1": {"default", "conv"}, "sd/lora_names_sd2": {"default"}, "sdxl/lora_names_sdxl": {"default"}}  # fmt: skip


# ---------------------------------------------------------------- blocks


def entries(part: str) -> list:
    return load_golden_json(BLOCKS)[part]


def test_learning_rate_factors():
    recorded = entries("lr_weights")
    assert len(recorded) == 20
    for entry in recorded:
        if isinstance(entry["weights"], str):
            continue  # the reference crashed; tests/networks/test_block_weights.py says what we do
        kind = lora.SdxlArguments if entry["sdxl"] else lora.Sd1Arguments
        factors = parse_arguments(kind, entry["options"]).factors
        if entry["weights"] is None:
            assert factors is None
        else:
            assert factors == pytest.approx(entry["weights"], rel=1e-12, abs=1e-12), entry["options"]


@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
def test_block_of_each_module(arch):
    network = network_of(arch, {"conv_dim": "4"})
    found = {made.lora_name: network._targets[made.lora_name].candidate.block for made in network.unet_loras}
    assert found == load_golden_json(BLOCKS)["block_index"][arch]


@pytest.mark.parametrize("case", range(5))
def test_ranks_and_alphas_by_block(case):
    entry = entries("block_dims")[case]
    network = network_of(entry["arch"], entry["options"])
    assert len(network.unet_loras) == entry["unet_modules"]
    assert len(network.text_encoder_loras) == entry["text_encoder_modules"]
    found: dict[str, dict] = {}
    for made in network.unet_loras:
        place = network._targets[made.lora_name].candidate
        kind = "conv3x3" if place.is_wide else "linear_or_1x1"
        group = found.setdefault(f"{place.block}/{kind}", {"rank": made.lora_dim, "alpha": float(made.alpha), "modules": 0})
        assert (group["rank"], group["alpha"]) == (made.lora_dim, float(made.alpha))
        group["modules"] += 1
    assert found == entry["per_block"]


def test_all_recorded_blocks_are_tested():
    assert len(entries("block_dims")) == 5


@pytest.mark.parametrize("case", range(6))
def test_optimizer_groups(case):
    entry = [entry for entry in entries("param_groups") if entry["arch"] in ("sd1", "sdxl")][case]
    network = network_of(entry["arch"], entry["options"])
    rates = entry["lrs"]
    network.apply_to(None, None, not rates.get("unet_only"), True)
    try:
        groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(rates["te"], rates["unet"], rates["default"])
    finally:
        for made in network.loras:  # the models serve the next test
            made.org_module_ref[0].__dict__.pop("forward", None)
    keys = {id(parameter): key for key, parameter in network.named_parameters()}
    found = merged(
        [(name, group["lr"], [keys[id(p)] for p in group["params"]]) for name, group in zip(names, groups, strict=True)]
    )
    assert list(found) == [group["description"] for group in entry["groups"]]
    for group in entry["groups"]:
        lr, params = found[group["description"]]
        assert lr == pytest.approx(group["lr"], rel=1e-12)
        assert len(params) == group["count"] and {key.split(".")[1] for key in params} == set(group["kinds"])
        assert params[0] == group["first"] and (entry["arch"] == "sdxl" or params[-1] == group["last"])


def merged(groups: list[tuple[str, float, list[str]]]) -> dict[str, tuple[float, list[str]]]:
    """The reference has one group for all text encoders where we have one for each."""
    found: dict[str, tuple[float, list[str]]] = {}
    for name, lr, params in groups:
        whole = name.replace("textencoder 1", "textencoder").replace("textencoder 2", "textencoder")
        before = found.get(whole, (lr, []))
        assert before[0] == lr
        found[whole] = (lr, before[1] + params)
    return found
