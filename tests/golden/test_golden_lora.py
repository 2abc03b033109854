"""LoRA against recorded numbers: the layer, the max-norm rule, and which modules and optimizer groups arguments give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from golden_files import Golden, load_golden, load_golden_json, relative_error
from networks import lora_anima
from networks.layer import Dropouts, LoRAModule, SplitLoRAModule
from tests.golden.lora_groups import assert_as_recorded, text_encoder_tree, tree_of

TOLERANCE = 1e-5  # of the file's header
SCENARIOS = ("default", "reg_dims_lrs_loraplus", "llm_adapter_and_patterns", "with_text_encoder", "reg_lr_zero_drops_group")


@pytest.fixture(params=["anima", "lumina"])
def golden(request) -> Golden:
    return load_golden(f"{request.param}/lora_module.safetensors")


def applied(golden: Golden, **given) -> tuple[nn.Linear, LoRAModule]:
    sizes = golden.about["params"]
    layer = nn.Linear(sizes["din"], sizes["dout"])
    layer.load_state_dict({key.removeprefix("org."): golden.weights[key] for key in ("org.weight", "org.bias")})
    given = {"lora_dim": sizes["rank"], "alpha": sizes["alpha"], "multiplier": sizes["mult"], **given}
    lora = LoRAModule("lora_unet_x", layer.requires_grad_(False), **given)
    pair = {key.removeprefix("lora."): value for key, value in golden.weights.items() if key.startswith("lora.")}
    lora.load_state_dict({**pair, "alpha": lora.alpha})
    lora.apply_to()
    return layer, lora


def test_forward_and_gradients(golden):
    layer, lora = applied(golden)
    out = layer(golden.inputs["x"])
    assert relative_error(out.detach(), golden.outputs["forward"]) <= TOLERANCE
    assert abs(lora.scale - float(golden.outputs["scale"])) <= TOLERANCE
    loss = (out * golden.inputs["loss_weight"]).mean()
    grads = torch.autograd.grad(loss, [lora.lora_down.weight, lora.lora_up.weight])
    for name, grad in zip(("down", "up"), grads, strict=True):
        assert relative_error(grad, golden.outputs[f"grad/lora_{name}.weight"]) <= TOLERANCE


def test_frozen_layer(golden):
    layer, lora = applied(golden)
    lora.enabled = False
    assert relative_error(layer(golden.inputs["x"]).detach(), golden.outputs["org_forward"]) <= TOLERANCE


def test_alpha_zero(golden):
    layer, lora = applied(golden, alpha=0, multiplier=1.0)  # recorded without a multiplier
    assert float(lora.alpha) == float(golden.outputs["alpha_zero/alpha_buffer"])
    assert relative_error(layer(golden.inputs["x"]).detach(), golden.outputs["alpha_zero/forward"]) <= TOLERANCE


def test_rank_dropout_with_the_recorded_draw(golden, monkeypatch):
    layer, lora = applied(golden, dropouts=Dropouts(rank=0.4))
    uniform = golden.inputs["rank_dropout_0.4/uniform"]
    monkeypatch.setattr(torch, "rand", lambda shape, **_: uniform.clone().view(shape))
    assert relative_error(layer(golden.inputs["x"]).detach(), golden.outputs["rank_dropout_0.4/forward"]) <= TOLERANCE
    lora.eval()
    assert relative_error(layer(golden.inputs["x"]).detach(), golden.outputs["forward"]) <= TOLERANCE


def test_merge(golden):
    layer, lora = applied(golden)
    lora.add_to_weight(lora.state_dict())
    assert relative_error(layer.weight, golden.outputs["merged_weight"]) <= TOLERANCE


def test_a_pair_for_each_of_three_parts(golden):
    """As q, k and v of unequal size have them: the file's is one pair of the same effect."""
    sizes, parts = golden.about["params"], tuple(golden.inputs["split_dims"].tolist())
    layer = nn.Linear(sizes["din"], sizes["dout"])
    layer.load_state_dict({key.removeprefix("org."): golden.weights[key] for key in ("org.weight", "org.bias")})
    given = {"lora_dim": sizes["rank"], "alpha": sizes["alpha"], "multiplier": sizes["mult"]}
    lora = SplitLoRAModule("lora_unet_x", layer.requires_grad_(False), parts=parts, **given)
    halves = {half: torch.cat([golden.weights[f"split.lora_{half}.{n}.weight"] for n in range(3)]) for half in ("down", "up")}
    lora.load_state_dict({**{f"lora_{half}.weight": value for half, value in halves.items()}, "alpha": lora.alpha})
    lora.apply_to()
    recorded = golden.outputs["split_dims/forward"]
    assert relative_error(layer(golden.inputs["x"]).detach(), recorded) <= TOLERANCE
    lora.enabled = False
    lora.add_to_weight(lora.file_tensors())
    assert relative_error(layer(golden.inputs["x"]).detach(), recorded) <= TOLERANCE


def test_max_norm(golden):
    before = {key.removeprefix("max_norm_before/"): value for key, value in golden.weights.items() if key.startswith("max_norm")}
    linears = {}
    for key in before:
        name, _, part = key.partition(".")
        if part == "lora_down.weight":
            path = name.removeprefix("lora_unet_").replace("_", ".")
            linears[path] = torch.Size([before[f"{name}.lora_up.weight"].shape[0], before[key].shape[1]])
    model = tree_of(linears)
    network, _ = lora_anima.create_network_from_weights(1.0, "unread", None, None, model, weights_sd=before)
    network.apply_to(None, model)
    network.load_state_dict(before)
    scaled, mean, largest = network.apply_max_norm_regularization(golden.about["params"]["maxnorm"], "cpu")
    recorded = golden.outputs["max_norm/keys_scaled_mean_max"]
    assert int(scaled) == int(recorded[0])
    assert relative_error(torch.stack([mean, largest]), recorded[1:]) <= TOLERANCE
    for key, value in network.state_dict().items():
        assert relative_error(value, golden.outputs[f"max_norm_after/{key}"]) <= TOLERANCE, key


@pytest.mark.parametrize("name", SCENARIOS)
def test_modules_and_optimizer_groups(name):
    scenario = next(entry for entry in load_golden_json("anima/lora_param_groups.json")["scenarios"] if entry["name"] == name)
    assert_as_recorded(network_of(scenario), scenario)


def test_every_recorded_scenario_is_tested():
    recorded = [entry["name"] for entry in load_golden_json("anima/lora_param_groups.json")["scenarios"]]
    assert sorted(recorded) == sorted(SCENARIOS)


def network_of(scenario: dict):
    weights = load_golden("anima/dit_forward.safetensors").weights
    # the order of the model, which decides the order of the groups; a file is sorted by name. Embeddings are no Linears
    weights = {key: weights[key] for key in sorted(weights, key=lambda key: key.replace("cross_attn", "then_cross"))}
    shapes = {
        key.removeprefix("net."): w.shape for key, w in weights.items() if w.ndim == 2 and not key.endswith(".embed.weight")
    }
    denoiser = tree_of(shapes)
    encoder = text_encoder_tree()
    network = lora_anima.create_network(
        1.0, scenario["network_dim"], scenario["network_alpha"], None, [encoder], denoiser, neuron_dropout=None, **scenario["network_args"]
    )  # fmt: skip
    network.apply_to([encoder], denoiser, scenario["train_text_encoder"], True)
    return network
